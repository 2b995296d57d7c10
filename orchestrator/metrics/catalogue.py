"""Every number that is published: its name, unit and meaning, once.

`steps.jsonl`, `report.json`, the Prometheus endpoint and the dashboards take names from here; in Prometheus
they carry the prefix `orchestrator_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "orchestrator_"
RANK_LABELS = ("run", "attempt", "node", "rank", "gpu")
RUN_LABELS = ("run", "attempt")


@dataclass(frozen=True)
class Metric:
    """One published number.

    Attributes:
        name: Field name in files; Prometheus adds the prefix.
        help: Meaning and unit, one sentence.
        scope: `rank` for one series a worker, `run` for one a run.
        lasting: Whether it stays true when the attempt that it was measured in is over.
    """

    name: str
    help: str
    scope: Literal["rank", "run"]
    lasting: bool = False


STEP_METRICS: tuple[Metric, ...] = (
    Metric("step", "Optimizer steps completed.", "run", lasting=True),
    Metric("epoch", "Passes over the packs completed, as a fraction.", "run", lasting=True),
    Metric("loss", "Cross-entropy in nats per trained token, over all ranks of the step.", "run"),
    Metric("gradient_norm", "L2 norm of the whole gradient before clipping.", "run"),
    Metric("learning_rate", "Learning rate of the step.", "run"),
    Metric("tgs", "Real (non-padding) tokens per GPU per second.", "rank"),
    Metric("tgs_trained", "Tokens that are targets of the loss, per GPU per second.", "rank"),
    Metric("tgs_slots", "Packed slots including padding, per GPU per second.", "rank"),
    Metric(
        "tflops_model", "TFLOP/s per GPU of the work asked for: causal, per document, no recompute.", "rank"
    ),
    Metric("tflops_hardware", "TFLOP/s per GPU of the work done, recomputation included.", "rank"),
    Metric("mfu", "tflops_model over the device's dense peak; absent where the peak is not known.", "rank"),
    Metric(
        "hfu", "tflops_hardware over the device's dense peak; absent where the peak is not known.", "rank"
    ),
    Metric("step_seconds", "Wall seconds of the optimizer step, without evaluation and checkpoints.", "run"),
    Metric("data_seconds", "Seconds of the step spent on making batches.", "rank"),
    Metric("forward_seconds", "Seconds of the step spent in forward passes.", "rank"),
    Metric("backward_seconds", "Seconds of the step spent in backward passes.", "rank"),
    Metric("optimizer_seconds", "Seconds of the step spent in the optimizer.", "rank"),
    Metric("tokens", "Real tokens of the step.", "rank"),
    Metric("trained_tokens", "Tokens of the step that are targets of the loss.", "rank"),
    Metric("padding_fraction", "Share of the step's slots that hold padding.", "run"),
    Metric(
        "memory_bytes", "Memory in use at the end of the step: allocated on CUDA, resident on CPU.", "rank"
    ),
    Metric("memory_peak_bytes", "Largest memory in use so far: allocated on CUDA, resident on CPU.", "rank"),
    Metric(
        "memory_reserved_bytes", "Memory that the allocator holds: reserved on CUDA, resident on CPU.", "rank"
    ),
    Metric(
        "memory_reserved_peak_bytes",
        "Largest memory that the allocator has held so far: reserved on CUDA, resident on CPU.",
        "rank",
    ),
    Metric("host_memory_peak_bytes", "Largest resident memory of the worker's process so far.", "rank"),
)

DEVICE_METRICS: tuple[Metric, ...] = (
    Metric(
        "memory_limit_bytes", "Memory of the worker's device; absent where it has none of its own.", "rank"
    ),
)

RUN_METRICS: tuple[Metric, ...] = (
    Metric(
        "evaluation_loss",
        "Cross-entropy in nats per trained token on the held-out rows.",
        "run",
        lasting=True,
    ),
    Metric("evaluation_seconds", "Seconds that the last evaluation took.", "run", lasting=True),
    Metric("restarts", "How often the worker group was started again.", "run", lasting=True),
    Metric("steps_lost", "Steps that were done again after restarts.", "run", lasting=True),
    Metric("steps_planned", "Optimizer steps of the whole run.", "run", lasting=True),
    Metric("steps_to_go", "Optimizer steps that are left.", "run", lasting=True),
    Metric(
        "tokens_to_go",
        "Real tokens that are left, estimated from those of the last steps of the attempt.",
        "run",
    ),
    Metric("seconds_to_go", "Seconds that are left at the median pace of the attempt's last steps.", "run"),
    Metric("world_size", "Workers of the attempt.", "run", lasting=True),
    Metric(
        "attempt_start_timestamp_seconds",
        "Unix time at which the attempt began, or at which it was taken up by the recorder that shows it.",
        "run",
        lasting=True,
    ),
    Metric("last_step_timestamp_seconds", "Unix time of the last completed step.", "run", lasting=True),
    Metric("checkpoint_seconds", "Seconds that the last checkpoint took.", "run", lasting=True),
    Metric(
        "checkpoint_every_steps",
        "Steps from one checkpoint to the next; absent where there is one only at the end.",
        "run",
        lasting=True,
    ),
    Metric(
        "last_checkpoint_timestamp_seconds",
        "Unix time of the last published checkpoint.",
        "run",
        lasting=True,
    ),
)

COUNTERS: tuple[Metric, ...] = (
    Metric("processed_tokens", "Real tokens since the attempt began.", "rank"),
    Metric("processed_flops", "FLOPs of the model's work since the attempt began.", "rank"),
)

RUN_COUNTERS: tuple[Metric, ...] = (
    Metric(
        "processed_seconds",
        "Wall seconds of optimizer steps since the attempt began, without evaluation and checkpoints.",
        "run",
    ),
    Metric(
        "skipped_steps",
        "Steps since the attempt began whose update was left out because the loss scale was too high.",
        "run",
    ),
)

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint")
PHASE_LABELS = (*RUN_LABELS, "phase")
PHASE_SECONDS = Metric(
    "step_phase_seconds",
    "Seconds by phase: of a step one observation a rank, of an evaluation and a checkpoint one in all.",
    "run",
)
PHASE_BOUNDS_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

INFO = Metric(
    "run_info", "Effective zero_stage, sequence_parallel_size, world_size, dtype and device; value 1.", "run"
)
INFO_LABELS = (*RUN_LABELS, "zero_stage", "sequence_parallel_size", "world_size", "dtype", "device")


def sample_names() -> frozenset[str]:
    """Return every name that a sample at the endpoint can have."""
    gauges = (*STEP_METRICS, *DEVICE_METRICS, *RUN_METRICS, INFO)
    names = {metric.name for metric in gauges}
    names |= {f"{metric.name}_total" for metric in (*COUNTERS, *RUN_COUNTERS)}
    names |= {f"{PHASE_SECONDS.name}_{part}" for part in ("bucket", "sum", "count")}
    return frozenset(PREFIX + name for name in names)
