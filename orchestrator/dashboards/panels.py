"""Definitions of the dashboards; `grafana.py` converts them to JSON.

Panels of single ranks are limited to ten ranks, so that they remain readable for thousands of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = '{cluster=~"$cluster", run=~"$run"}'
ALL_SETS = '{cluster=~"$cluster", run=~"$run", eval_set=""}'
EACH_SET = '{cluster=~"$cluster", run=~"$run", eval_set!=""}'
RANK = '{cluster=~"$cluster", run=~"$run", node=~"$node", rank=~"$rank"}'
OF_RANK = "{{run}} rank {{rank}} on {{node}} gpu {{gpu}}"
TOKENS_A_SECOND = "suffix: tok/s"
TFLOPS = "suffix: TFLOP/s"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Title.
        description: How to interpret the panel.
        unit: Grafana unit.
        queries: Queries of the panel.
        kind: A time series graph, the latest values, or a table of labels.
        width: Width in columns; a dashboard has 24.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["graph", "stat", "table"] = "graph"
    width: int = 8


@dataclass(frozen=True)
class Section:
    """A row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A dashboard variable: the values of a label."""

    name: str
    query: str


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    sections: tuple[Section, ...]


def stat(title: str, description: str, unit: str, expr: str, legend: str = "{{run}}") -> Panel:
    """Create a panel with the latest value of each run."""
    return Panel(title, description, unit, (Query(expr, legend),), kind="stat", width=4)


def graph(title: str, description: str, unit: str, *queries: tuple[str, str], width: int = 8) -> Panel:
    """Create a graph from pairs of query and legend."""
    return Panel(title, description, unit, tuple(Query(*query) for query in queries), width=width)


PROGRESS = Section(
    "Progress",
    (
        stat(
            "Steps remaining", "Remaining optimizer steps.", "short", f"run:orchestrator_steps_to_go:max{RUN}"
        ),
        stat(
            "Time remaining",
            "At the median pace of the last 20 steps, without evaluations and checkpoints.",
            "s",
            f"max by (cluster, run) (orchestrator_seconds_to_go{RUN})",
        ),
        stat(
            "Tokens remaining",
            "Remaining real tokens, estimated from the last 20 steps.",
            "short",
            f"max by (cluster, run) (orchestrator_tokens_to_go{RUN})",
        ),
        stat(
            "Age of the last step",
            "Grows while no step completes; basis of the alert OrchestratorStalled.",
            "s",
            f"run:orchestrator_step_age:seconds{RUN}",
        ),
        stat(
            "Active ranks",
            "Ranks with a completed step in the current attempt; 0 between attempts.",
            "short",
            f"run:orchestrator_world_size:max{RUN} - run:orchestrator_ranks_missing:count{RUN}",
        ),
        stat(
            "Restarts",
            "Restarts of the worker group.",
            "short",
            f"max by (cluster, run) (orchestrator_restarts{RUN})",
        ),
        Panel(
            "Runs",
            "Effective parallel configuration of each run, as passed to DeepSpeed.",
            "none",
            (Query(f"orchestrator_run_info{RUN}", ""),),
            kind="table",
            width=24,
        ),
    ),
)

THROUGHPUT = Section(
    "Throughput",
    (
        graph(
            "Tokens per GPU per second, last step",
            "TGS counts real tokens; trained: tokens with a label; slots: including padding, as most tools "
            "report. Mean over ranks; absent without live workers.",
            TOKENS_A_SECOND,
            (f"run:orchestrator_tgs:avg{RUN}", "{{run}} TGS"),
            (f"avg by (cluster, run) (orchestrator_tgs_trained{RUN})", "{{run}} trained"),
            (f"avg by (cluster, run) (orchestrator_tgs_slots{RUN})", "{{run}} slots"),
        ),
        graph(
            "Tokens per GPU per second, counted",
            "Over five minutes, per step time as in report.json, and per wall-clock time, which includes "
            "pauses and restarts and is 0 for a run that hangs.",
            TOKENS_A_SECOND,
            (f"run:orchestrator_tgs:steps5m{RUN}", "{{run}} steps"),
            (f"run:orchestrator_tgs:rate5m{RUN}", "{{run}} wall"),
        ),
        graph(
            "TFLOP/s per GPU",
            "Model: causal attention within documents. Hardware: including recomputation.",
            TFLOPS,
            (f"run:orchestrator_tflops_model:avg{RUN}", "{{run}} model"),
            (f"avg by (cluster, run) (orchestrator_tflops_hardware{RUN})", "{{run}} hardware"),
        ),
        graph(
            "MFU and HFU",
            "Fraction of the device's dense peak; absent for a device that is not in the hardware catalogue.",
            "percentunit",
            (f"run:orchestrator_mfu:avg{RUN}", "{{run}} MFU"),
            (f"avg by (cluster, run) (orchestrator_hfu{RUN})", "{{run}} HFU"),
        ),
        graph(
            "Padding",
            "Fraction of the step's slots that are padding.",
            "percentunit",
            (f"max by (cluster, run) (orchestrator_padding_fraction{RUN})", "{{run}}"),
        ),
        graph(
            "TFLOP/s of the ten lowest ranks",
            "A rank with shorter documents has less work; a rank with the same tokens that remains low is "
            "slow.",
            TFLOPS,
            (f"bottomk(10, orchestrator_tflops_model{RANK})", OF_RANK),
        ),
    ),
)

STEPS = Section(
    "Steps and stragglers",
    (
        graph(
            "Step",
            "Wall-clock seconds of the optimizer step, the same for all ranks, and the median of one hour.",
            "s",
            (f"max by (cluster, run) (orchestrator_step_seconds{RUN})", "{{run}} last"),
            (f"run:orchestrator_step_seconds:median1h{RUN}", "{{run}} median"),
        ),
        graph(
            "Phases, mean over ranks",
            "Seconds per step by phase; evaluations and checkpoints in total.",
            "s",
            (
                "sum by (cluster, run, phase) "
                f"(rate(orchestrator_step_phase_seconds_sum{RUN}[$__rate_interval])) / sum by (cluster, run, "
                f"phase) (rate(orchestrator_step_phase_seconds_count{RUN}[$__rate_interval]) > 0)",
                "{{run}} {{phase}}",
            ),
        ),
        graph(
            "Phases, 99th percentile over ranks",
            "From a histogram with two buckets per decade: only an order of magnitude.",
            "s",
            (
                "histogram_quantile(0.99, sum by (cluster, run, phase, le) "
                f"(rate(orchestrator_step_phase_seconds_bucket{RUN}[$__rate_interval])))",
                "{{run}} {{phase}}",
            ),
        ),
        graph(
            "Ten slowest ranks, relative to the median of their run",
            "Seconds of batch preparation and forward passes; OrchestratorStraggler fires above 1.5.",
            "none",
            (
                f"topk(10, rank:orchestrator_own_seconds:avg5m{RANK} / on (cluster, run) group_left () "
                "run:orchestrator_own_seconds:median)",
                OF_RANK,
            ),
            width=12,
        ),
        graph(
            "Ten ranks with the longest data time",
            "Seconds of the step spent preparing batches.",
            "s",
            (f"topk(10, orchestrator_data_seconds{RANK})", OF_RANK),
            width=12,
        ),
    ),
)

MEMORY = Section(
    "Memory",
    (
        graph(
            "Highest memory use",
            "Peak allocated memory since the attempt started, as a fraction of the device memory; absent on "
            "CPU.",
            "percentunit",
            (
                f"max by (cluster, run) (orchestrator_memory_peak_bytes{RUN} / "
                f"orchestrator_memory_limit_bytes{RUN})",
                "{{run}}",
            ),
        ),
        graph(
            "Allocated and reserved, highest rank",
            "Reserved far above allocated indicates fragmentation.",
            "bytes",
            (f"max by (cluster, run) (orchestrator_memory_bytes{RUN})", "{{run}} allocated"),
            (f"max by (cluster, run) (orchestrator_memory_reserved_bytes{RUN})", "{{run}} reserved"),
            (
                f"max by (cluster, run) (orchestrator_memory_reserved_peak_bytes{RUN})",
                "{{run}} reserved, peak",
            ),
        ),
        graph(
            "Ten ranks with the highest memory use",
            "Peak allocated memory since the attempt started.",
            "bytes",
            (f"topk(10, orchestrator_memory_peak_bytes{RANK})", OF_RANK),
        ),
        graph(
            "Host memory of the workers, by node",
            "Sum of the peak resident set sizes of the workers; includes offloaded state.",
            "bytes",
            (f"sum by (cluster, run, node) (orchestrator_host_memory_peak_bytes{RANK})", "{{run}} {{node}}"),
            width=24,
        ),
    ),
)

TRAINING = Section(
    "Training",
    (
        graph(
            "Loss",
            "Nats per trained token; steps repeated after a restart appear twice.",
            "none",
            (f"max by (cluster, run) (orchestrator_loss{RUN})", "{{run}} training"),
            (f"max by (cluster, run) (orchestrator_evaluation_loss{ALL_SETS})", "{{run}} held out"),
            (
                f"max by (cluster, run, eval_set) (orchestrator_evaluation_loss{EACH_SET})",
                "{{run}} held out: {{eval_set}}",
            ),
        ),
        graph(
            "Gradient norm",
            "L2 norm of the whole gradient before clipping.",
            "none",
            (f"max by (cluster, run) (orchestrator_gradient_norm{RUN})", "{{run}}"),
        ),
        graph(
            "Learning rate",
            "Learning rate of the last step.",
            "sci",
            (f"max by (cluster, run) (orchestrator_learning_rate{RUN})", "{{run}}"),
        ),
    ),
)

SAFETY = Section(
    "Checkpoints and restarts",
    (
        graph(
            "Checkpoint and evaluation seconds",
            "Duration of the last ones; training pauses meanwhile.",
            "s",
            (f"max by (cluster, run) (orchestrator_checkpoint_seconds{RUN})", "{{run}} checkpoint"),
            (f"max by (cluster, run) (orchestrator_evaluation_seconds{RUN})", "{{run}} evaluation"),
        ),
        graph(
            "Age of the last checkpoint",
            "Work that would be lost by a failure.",
            "s",
            (f"run:orchestrator_checkpoint_age:seconds{RUN}", "{{run}}"),
        ),
        graph(
            "Restarts, steps lost and skipped",
            "Lost: repeated after a restart. Skipped: no update because of fp16 overflow in this attempt.",
            "short",
            (f"max by (cluster, run) (orchestrator_restarts{RUN})", "{{run}} restarts"),
            (f"max by (cluster, run) (orchestrator_steps_lost{RUN})", "{{run}} steps lost"),
            (f"max by (cluster, run) (orchestrator_skipped_steps_total{RUN})", "{{run}} steps skipped"),
        ),
    ),
)

_CLUSTER = Variable("cluster", "label_values(orchestrator_world_size, cluster)")
_OF_CLUSTER = '{cluster=~"$cluster"}'
RUNS = Board(
    "orchestrator-runs",
    "Runs and throughput",
    "Progress, throughput, step phases, stragglers, memory and loss of training runs.",
    (
        _CLUSTER,
        Variable("run", f"label_values(orchestrator_world_size{_OF_CLUSTER}, run)"),
        Variable("node", f"label_values(orchestrator_tokens{RUN}, node)"),
        Variable(
            "rank",
            'label_values(orchestrator_tokens{cluster=~"$cluster", run=~"$run", node=~"$node"}, rank)',
        ),
    ),
    (PROGRESS, THROUGHPUT, STEPS, MEMORY, TRAINING, SAFETY),
)
