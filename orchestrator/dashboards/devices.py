"""The dashboard "Cluster": what NVIDIA's DCGM says of devices, with the run and rank that each works for."""

from __future__ import annotations

from orchestrator.dashboards.panels import OF_RANK, Board, Panel, Query, Section, Variable, graph, stat

RANK = '{cluster=~"$cluster", run=~"$run", node=~"$node", rank=~"$rank"}'
NODE = '{cluster=~"$cluster", node=~"$node"}'
DCGM = (
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_SM_CLOCK",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
)
_HOLDERS = f"max by (cluster, node, gpu, run, rank) (orchestrator_tokens{RANK} * 0 + 1)"


def held(metric: str) -> str:
    """Return a metric of DCGM for the devices that runs hold, with labels run and rank."""
    device = f"max by (cluster, node, gpu) ({metric}{NODE})"
    return f"{device} * on (cluster, node, gpu) group_right () ({_HOLDERS})"


def _by_rank(title: str, description: str, unit: str, expr: str) -> Panel:
    return Panel(title, description, unit, (Query(expr, OF_RANK),), width=12)


CLUSTER = Board(
    "orchestrator-cluster",
    "Cluster",
    "Devices by node and GPU, joined with the ranks that work on them by the labels node and gpu.",
    (
        Variable("cluster", "label_values(DCGM_FI_DEV_GPU_UTIL, cluster)"),
        Variable("node", 'label_values(DCGM_FI_DEV_GPU_UTIL{cluster=~"$cluster"}, node)'),
        Variable("run", 'label_values(orchestrator_world_size{cluster=~"$cluster"}, run)'),
        Variable("rank", 'label_values(orchestrator_tokens{cluster=~"$cluster", run=~"$run"}, rank)'),
    ),
    (
        Section(
            "Runs",
            (
                stat(
                    "Devices held",
                    "Devices of DCGM that a rank of the run works on. Fewer than its ranks: the labels node "
                    "and gpu of both sides do not agree, see k8s/monitoring/prometheus.yml.",
                    "short",
                    f"count by (cluster, run) ({held('DCGM_FI_DEV_GPU_UTIL')})",
                ),
                stat(
                    "Nodes",
                    "Nodes with a rank of the run.",
                    "short",
                    f"count by (cluster, run) (count by (cluster, run, node) (orchestrator_tokens{RANK}))",
                ),
                stat(
                    "Power",
                    "Of all devices that the run holds.",
                    "watt",
                    f"sum by (cluster, run) ({held('DCGM_FI_DEV_POWER_USAGE')})",
                ),
                stat(
                    "Energy a token",
                    "Power over real tokens a second, of five minutes.",
                    "suffix: J/token",
                    f"sum by (cluster, run) ({held('DCGM_FI_DEV_POWER_USAGE')}) / "
                    f"(sum by (cluster, run) (rate(orchestrator_processed_tokens_total{RANK}[5m])) > 0)",
                ),
                stat(
                    "Devices idle",
                    "Devices of DCGM that are used less than 5 % and that no rank of the chosen runs holds.",
                    "short",
                    f"count by (cluster) (max by (cluster, node, gpu) (DCGM_FI_DEV_GPU_UTIL{NODE}) < 5 "
                    f"unless on (cluster, node, gpu) {_HOLDERS}) "
                    f"or count by (cluster) (DCGM_FI_DEV_GPU_UTIL{NODE}) * 0",
                    "{{cluster}}",
                ),
            ),
        ),
        Section(
            "Utilisation",
            (
                graph(
                    "GPU utilisation by node",
                    "Mean over the node's devices. Waiting in a collective counts as use: look at power.",
                    "percent",
                    (f"avg by (cluster, node) (DCGM_FI_DEV_GPU_UTIL{NODE})", "{{node}}"),
                    width=12,
                ),
                _by_rank(
                    "GPU utilisation, ten lowest ranks",
                    "Devices that runs hold.",
                    "percent",
                    f"bottomk(10, {held('DCGM_FI_DEV_GPU_UTIL')})",
                ),
                _by_rank(
                    "Tensor cores active, ten lowest ranks",
                    "Share of cycles; close to what MFU can reach.",
                    "percentunit",
                    f"bottomk(10, {held('DCGM_FI_PROF_PIPE_TENSOR_ACTIVE')})",
                ),
                _by_rank(
                    "Memory used, ten fullest ranks",
                    "As the driver sees it: allocator, CUDA context and NCCL together.",
                    "mbytes",
                    f"topk(10, {held('DCGM_FI_DEV_FB_USED')})",
                ),
            ),
        ),
        Section(
            "Power and clocks",
            (
                graph(
                    "Power by node",
                    "Sum over the node's devices.",
                    "watt",
                    (f"sum by (cluster, node) (DCGM_FI_DEV_POWER_USAGE{NODE})", "{{node}}"),
                    width=12,
                ),
                _by_rank(
                    "Power, ten lowest ranks",
                    "Full utilisation at little power is a kernel that waits for other ranks.",
                    "watt",
                    f"bottomk(10, {held('DCGM_FI_DEV_POWER_USAGE')})",
                ),
                _by_rank(
                    "SM clock, ten lowest ranks",
                    "A straggler is often a device that was slowed down by heat or power.",
                    "suffix: MHz",
                    f"bottomk(10, {held('DCGM_FI_DEV_SM_CLOCK')})",
                ),
                _by_rank(
                    "Temperature, ten hottest ranks",
                    "Of the GPU.",
                    "celsius",
                    f"topk(10, {held('DCGM_FI_DEV_GPU_TEMP')})",
                ),
            ),
        ),
    ),
)
