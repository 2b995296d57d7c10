"""The dashboard "Cluster": DCGM metrics of GPUs, joined with the run and rank that use them."""

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
_USERS = f"max by (cluster, node, gpu, run, rank) (orchestrator_tokens{RANK} * 0 + 1)"


def used(metric: str) -> str:
    """Return a DCGM metric of GPUs used by runs, with labels run and rank."""
    device = f"max by (cluster, node, gpu) ({metric}{NODE})"
    return f"{device} * on (cluster, node, gpu) group_right () ({_USERS})"


def _by_rank(title: str, description: str, unit: str, expr: str) -> Panel:
    return Panel(title, description, unit, (Query(expr, OF_RANK),), width=12)


CLUSTER = Board(
    "orchestrator-cluster",
    "Cluster",
    "GPUs by node, joined with the ranks that use them by the labels node and gpu.",
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
                    "GPUs in use",
                    "GPUs used by ranks of the run. If fewer than its ranks, the labels node and gpu of "
                    "DCGM and the run differ; see k8s/monitoring/prometheus.yml.",
                    "short",
                    f"count by (cluster, run) ({used('DCGM_FI_DEV_GPU_UTIL')})",
                ),
                stat(
                    "Nodes",
                    "Nodes with ranks of the run.",
                    "short",
                    f"count by (cluster, run) (count by (cluster, run, node) (orchestrator_tokens{RANK}))",
                ),
                stat(
                    "Power",
                    "Total power of the GPUs used by the run.",
                    "watt",
                    f"sum by (cluster, run) ({used('DCGM_FI_DEV_POWER_USAGE')})",
                ),
                stat(
                    "Energy per token",
                    "Power divided by real tokens per second, over five minutes.",
                    "suffix: J/token",
                    f"sum by (cluster, run) ({used('DCGM_FI_DEV_POWER_USAGE')}) / "
                    f"(sum by (cluster, run) (rate(orchestrator_processed_tokens_total{RANK}[5m])) > 0)",
                ),
                stat(
                    "Idle GPUs",
                    "GPUs with less than 5 % utilization that no rank of the selected runs uses.",
                    "short",
                    f"count by (cluster) (max by (cluster, node, gpu) (DCGM_FI_DEV_GPU_UTIL{NODE}) < 5 "
                    f"unless on (cluster, node, gpu) {_USERS}) or count by (cluster) "
                    f"(DCGM_FI_DEV_GPU_UTIL{NODE}) * 0",
                    "{{cluster}}",
                ),
            ),
        ),
        Section(
            "Utilization",
            (
                graph(
                    "GPU utilization by node",
                    "Mean over the GPUs of a node. Waiting in a collective counts as utilization; compare "
                    "power.",
                    "percent",
                    (f"avg by (cluster, node) (DCGM_FI_DEV_GPU_UTIL{NODE})", "{{node}}"),
                    width=12,
                ),
                _by_rank(
                    "GPU utilization, ten lowest ranks",
                    "GPUs used by runs.",
                    "percent",
                    f"bottomk(10, {used('DCGM_FI_DEV_GPU_UTIL')})",
                ),
                _by_rank(
                    "Tensor cores active, ten lowest ranks",
                    "Fraction of cycles; an approximate upper bound of MFU.",
                    "percentunit",
                    f"bottomk(10, {used('DCGM_FI_PROF_PIPE_TENSOR_ACTIVE')})",
                ),
                _by_rank(
                    "Memory used, ten highest ranks",
                    "As reported by the driver: allocator, CUDA context and NCCL.",
                    "mbytes",
                    f"topk(10, {used('DCGM_FI_DEV_FB_USED')})",
                ),
            ),
        ),
        Section(
            "Power and clocks",
            (
                graph(
                    "Power by node",
                    "Sum over the GPUs of a node.",
                    "watt",
                    (f"sum by (cluster, node) (DCGM_FI_DEV_POWER_USAGE{NODE})", "{{node}}"),
                    width=12,
                ),
                _by_rank(
                    "Power, ten lowest ranks",
                    "High utilization at low power indicates a kernel that waits for other ranks.",
                    "watt",
                    f"bottomk(10, {used('DCGM_FI_DEV_POWER_USAGE')})",
                ),
                _by_rank(
                    "SM clock, ten lowest ranks",
                    "Stragglers are often GPUs throttled by temperature or power.",
                    "suffix: MHz",
                    f"bottomk(10, {used('DCGM_FI_DEV_SM_CLOCK')})",
                ),
                _by_rank(
                    "Temperature, ten hottest ranks",
                    "GPU temperature.",
                    "celsius",
                    f"topk(10, {used('DCGM_FI_DEV_GPU_TEMP')})",
                ),
            ),
        ),
    ),
)
