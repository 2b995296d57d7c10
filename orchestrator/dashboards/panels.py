"""What the dashboards show, as plain values; `dashboards.py` makes Grafana's JSON of them.

Queries that show single ranks keep to the ten that matter most, so that a run of thousands can be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = '{cluster=~"$cluster", run=~"$run"}'
RANK = '{cluster=~"$cluster", run=~"$run", node=~"$node", rank=~"$rank"}'
OF_RANK = "{{run}} rank {{rank}} on {{node}} gpu {{gpu}}"
TOKENS_A_SECOND = "suffix: tok/s"
TFLOPS = "suffix: TFLOP/s"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what the legend says of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it shows.
        description: How to read it.
        unit: Grafana's name of the unit.
        queries: What is asked for.
        kind: A graph over time, the latest values, or a table of labels.
        width: Of the 24 columns of a dashboard.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["graph", "stat", "table"] = "graph"
    width: int = 8


@dataclass(frozen=True)
class Section:
    """A row with its panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label."""

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
    """Return a panel with the latest value of each run."""
    return Panel(title, description, unit, (Query(expr, legend),), kind="stat", width=4)


def graph(title: str, description: str, unit: str, *queries: tuple[str, str], width: int = 8) -> Panel:
    """Return a graph of queries, each with its legend."""
    return Panel(title, description, unit, tuple(Query(*query) for query in queries), width=width)


PROGRESS = Section(
    "Progress",
    (
        stat(
            "Steps to go", "Optimizer steps that are left.", "short", f"run:orchestrator_steps_to_go:max{RUN}"
        ),
        stat(
            "Time to go",
            "At the median pace of the last 20 steps, without evaluations and checkpoints.",
            "s",
            f"max by (cluster, run) (orchestrator_seconds_to_go{RUN})",
        ),
        stat(
            "Tokens to go",
            "Real tokens that are left, estimated from the last 20 steps.",
            "short",
            f"max by (cluster, run) (orchestrator_tokens_to_go{RUN})",
        ),
        stat(
            "Age of the last step",
            "Grows while no step is finished; OrchestratorStalled fires on it.",
            "s",
            f"run:orchestrator_step_age:seconds{RUN}",
        ),
        stat(
            "Ranks that report",
            "Ranks with a step in the current attempt; 0 between two attempts.",
            "short",
            f"run:orchestrator_world_size:max{RUN} - run:orchestrator_ranks_missing:count{RUN}",
        ),
        stat(
            "Restarts",
            "How often the worker group was started again.",
            "short",
            f"max by (cluster, run) (orchestrator_restarts{RUN})",
        ),
        Panel(
            "Runs",
            "How each run is spread, effectively: what DeepSpeed was really given.",
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
            "TGS counts real tokens, trained those with a label, slots padding too (as most tools print). "
            "Mean over ranks; absent while no workers live.",
            TOKENS_A_SECOND,
            (f"run:orchestrator_tgs:avg{RUN}", "{{run}} TGS"),
            (f"avg by (cluster, run) (orchestrator_tgs_trained{RUN})", "{{run}} trained"),
            (f"avg by (cluster, run) (orchestrator_tgs_slots{RUN})", "{{run}} slots"),
        ),
        graph(
            "Tokens per GPU per second, counted",
            "Over five minutes of steps, as report.json counts, and of wall time: there pauses "
            "and restarts cost, and a run that hangs falls to 0.",
            TOKENS_A_SECOND,
            (f"run:orchestrator_tgs:steps5m{RUN}", "{{run}} steps"),
            (f"run:orchestrator_tgs:rate5m{RUN}", "{{run}} wall"),
        ),
        graph(
            "TFLOP/s per GPU",
            "Model: the work asked for, causal and inside documents. Hardware: with what is recomputed.",
            TFLOPS,
            (f"run:orchestrator_tflops_model:avg{RUN}", "{{run}} model"),
            (f"avg by (cluster, run) (orchestrator_tflops_hardware{RUN})", "{{run}} hardware"),
        ),
        graph(
            "MFU and HFU",
            "Share of the device's dense peak; absent for a device that the catalogue does not know.",
            "percentunit",
            (f"run:orchestrator_mfu:avg{RUN}", "{{run}} MFU"),
            (f"avg by (cluster, run) (orchestrator_hfu{RUN})", "{{run}} HFU"),
        ),
        graph(
            "Padding",
            "Share of the step's slots that hold no token.",
            "percentunit",
            (f"max by (cluster, run) (orchestrator_padding_fraction{RUN})", "{{run}}"),
        ),
        graph(
            "TFLOP/s of the ten lowest ranks",
            "A rank with shorter documents has less work; one that stays low with as many tokens is slow.",
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
            "Wall seconds of the optimizer step, the same for all ranks, and the median of an hour.",
            "s",
            (f"max by (cluster, run) (orchestrator_step_seconds{RUN})", "{{run}} last"),
            (f"run:orchestrator_step_seconds:median1h{RUN}", "{{run}} median"),
        ),
        graph(
            "Phases, mean over ranks",
            "Seconds of a step by phase; an evaluation and a checkpoint count whole.",
            "s",
            (
                "sum by (cluster, run, phase) "
                f"(rate(orchestrator_step_phase_seconds_sum{RUN}[$__rate_interval])) / "
                "sum by (cluster, run, phase) "
                f"(rate(orchestrator_step_phase_seconds_count{RUN}[$__rate_interval]) > 0)",
                "{{run}} {{phase}}",
            ),
        ),
        graph(
            "Phases, 99th percentile over ranks",
            "From a histogram with two buckets a decade: an order of magnitude, not a figure to quote.",
            "s",
            (
                "histogram_quantile(0.99, sum by (cluster, run, phase, le) "
                f"(rate(orchestrator_step_phase_seconds_bucket{RUN}[$__rate_interval])))",
                "{{run}} {{phase}}",
            ),
        ),
        graph(
            "Ten slowest ranks, against the median of their run",
            "Seconds of making batches and passing forward; OrchestratorStraggler begins to look at 1.5.",
            "none",
            (
                f"topk(10, rank:orchestrator_own_seconds:avg5m{RANK} / on (cluster, run) group_left () "
                "run:orchestrator_own_seconds:median)",
                OF_RANK,
            ),
            width=12,
        ),
        graph(
            "Ten ranks that wait longest for data",
            "Seconds of the step that the host spent on making batches.",
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
            "Fullest device",
            "Most memory allocated since the attempt began, as a share of the device's; absent on CPU.",
            "percentunit",
            (
                "max by (cluster, run) "
                f"(orchestrator_memory_peak_bytes{RUN} / orchestrator_memory_limit_bytes{RUN})",
                "{{run}}",
            ),
        ),
        graph(
            "Allocated and reserved, fullest rank",
            "Reserved far above allocated is fragmentation.",
            "bytes",
            (f"max by (cluster, run) (orchestrator_memory_bytes{RUN})", "{{run}} allocated"),
            (f"max by (cluster, run) (orchestrator_memory_reserved_bytes{RUN})", "{{run}} reserved"),
            (
                f"max by (cluster, run) (orchestrator_memory_reserved_peak_bytes{RUN})",
                "{{run}} reserved, peak",
            ),
        ),
        graph(
            "Ten fullest ranks",
            "Most memory allocated since the attempt began.",
            "bytes",
            (f"topk(10, orchestrator_memory_peak_bytes{RANK})", OF_RANK),
        ),
        graph(
            "Host memory of the workers, by node",
            "Sum of the workers' largest resident sizes; offloaded state lies here.",
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
            "Nats per trained token; steps that were done again after a restart are shown twice.",
            "none",
            (f"max by (cluster, run) (orchestrator_loss{RUN})", "{{run}} training"),
            (f"max by (cluster, run) (orchestrator_evaluation_loss{RUN})", "{{run}} held out"),
        ),
        graph(
            "Gradient norm",
            "L2 norm of the whole gradient, before clipping.",
            "none",
            (f"max by (cluster, run) (orchestrator_gradient_norm{RUN})", "{{run}}"),
        ),
        graph(
            "Learning rate",
            "Of the last step.",
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
            "What the last ones took; no step is made meanwhile.",
            "s",
            (f"max by (cluster, run) (orchestrator_checkpoint_seconds{RUN})", "{{run}} checkpoint"),
            (f"max by (cluster, run) (orchestrator_evaluation_seconds{RUN})", "{{run}} evaluation"),
        ),
        graph(
            "Age of the last checkpoint",
            "Work that a failure would cost.",
            "s",
            (f"run:orchestrator_checkpoint_age:seconds{RUN}", "{{run}}"),
        ),
        graph(
            "Restarts, steps lost and skipped",
            "Lost steps were done again after a restart; skipped ones of the attempt updated nothing (fp16).",
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
