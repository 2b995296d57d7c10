"""Names, units and descriptions of all published metrics.

`steps.jsonl`, `report.json`, the Prometheus endpoint and the dashboards use these names; in Prometheus they
have the prefix `orchestrator_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "orchestrator_"
RANK_LABELS = ("run", "attempt", "node", "rank", "gpu")
RUN_LABELS = ("run", "attempt")
EVAL_SET_LABELS = (*RUN_LABELS, "eval_set")


@dataclass(frozen=True)
class Metric:
    """One published metric.

    Attributes:
        name: Field name in files; the Prometheus name without the prefix.
        help: Description with unit, one sentence.
        scope: `rank` for one series per worker, `run` for one per run.
        lasting: Whether the value stays valid after the end of its attempt.
    """

    name: str
    help: str
    scope: Literal["rank", "run"]
    lasting: bool = False


STEP_METRICS: tuple[Metric, ...] = (
    Metric("step", "Optimizer steps completed.", "run", lasting=True),
    Metric("epoch", "Completed passes over the packed data, as a fraction.", "run", lasting=True),
    Metric("loss", "Cross-entropy of the step in nats per trained token, over all ranks.", "run"),
    Metric("gradient_norm", "L2 norm of the whole gradient before clipping.", "run"),
    Metric("learning_rate", "Learning rate of the step.", "run"),
    Metric("tgs", "Real (non-padding) tokens per GPU per second.", "rank"),
    Metric("tgs_trained", "Tokens with a label, per GPU per second.", "rank"),
    Metric("tgs_slots", "Packed slots including padding, per GPU per second.", "rank"),
    Metric(
        "tflops_model",
        "Model TFLOP/s per GPU: causal attention within documents, without recomputation.",
        "rank",
    ),
    Metric("tflops_hardware", "Hardware TFLOP/s per GPU, including recomputation.", "rank"),
    Metric("mfu", "tflops_model divided by the device's dense peak; absent if the peak is unknown.", "rank"),
    Metric(
        "hfu", "tflops_hardware divided by the device's dense peak; absent if the peak is unknown.", "rank"
    ),
    Metric(
        "step_seconds", "Wall-clock seconds of the optimizer step, without evaluation and checkpoints.", "run"
    ),
    Metric("data_seconds", "Seconds of the step spent preparing batches.", "rank"),
    Metric("forward_seconds", "Seconds of the step spent in forward passes.", "rank"),
    Metric("backward_seconds", "Seconds of the step spent in backward passes.", "rank"),
    Metric("optimizer_seconds", "Seconds of the step spent in the optimizer.", "rank"),
    Metric("tokens", "Real tokens of the step.", "rank"),
    Metric("trained_tokens", "Tokens of the step with a label.", "rank"),
    Metric("padding_fraction", "Fraction of the step's slots that are padding.", "run"),
    Metric(
        "memory_bytes",
        "Memory in use at the end of the step: allocated on CUDA, resident set size on CPU.",
        "rank",
    ),
    Metric("memory_peak_bytes", "Peak memory in use: allocated on CUDA, resident set size on CPU.", "rank"),
    Metric(
        "memory_reserved_bytes",
        "Memory held by the allocator: reserved on CUDA, resident set size on CPU.",
        "rank",
    ),
    Metric(
        "memory_reserved_peak_bytes",
        "Peak memory held by the allocator: reserved on CUDA, resident set size on CPU.",
        "rank",
    ),
    Metric("host_memory_peak_bytes", "Peak resident set size of the worker process.", "rank"),
)

DEVICE_METRICS: tuple[Metric, ...] = (
    Metric("memory_limit_bytes", "Memory of the worker's device; absent on CPU.", "rank"),
)

RUN_METRICS: tuple[Metric, ...] = (
    Metric(
        "evaluation_loss",
        "Cross-entropy in nats per trained token on the held-out rows; with the label eval_set, that of one "
        "of several evaluation sets.",
        "run",
        lasting=True,
    ),
    Metric("evaluation_seconds", "Duration of the last evaluation in seconds.", "run", lasting=True),
    Metric("restarts", "Restarts of the worker group.", "run", lasting=True),
    Metric("steps_lost", "Steps repeated after restarts.", "run", lasting=True),
    Metric("steps_planned", "Total optimizer steps of the run.", "run", lasting=True),
    Metric("steps_to_go", "Remaining optimizer steps.", "run", lasting=True),
    Metric(
        "tokens_to_go",
        "Remaining real tokens, estimated from the last steps of the attempt.",
        "run",
    ),
    Metric("seconds_to_go", "Remaining seconds at the median pace of the attempt's last steps.", "run"),
    Metric("world_size", "Workers of the attempt.", "run", lasting=True),
    Metric(
        "attempt_start_timestamp_seconds",
        "Unix time at which the attempt started, or at which this recorder resumed it.",
        "run",
        lasting=True,
    ),
    Metric("last_step_timestamp_seconds", "Unix time of the last completed step.", "run", lasting=True),
    Metric("checkpoint_seconds", "Duration of the last checkpoint in seconds.", "run", lasting=True),
    Metric(
        "checkpoint_every_steps",
        "Steps between checkpoints; absent if there is only one at the end.",
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
    Metric("processed_tokens", "Real tokens since the attempt started.", "rank"),
    Metric("processed_flops", "Model FLOPs since the attempt started.", "rank"),
)

RUN_COUNTERS: tuple[Metric, ...] = (
    Metric(
        "processed_seconds",
        "Wall-clock seconds of optimizer steps since the attempt started, without evaluation and "
        "checkpoints.",
        "run",
    ),
    Metric(
        "skipped_steps",
        "Steps since the attempt started whose update was skipped because of fp16 overflow.",
        "run",
    ),
)

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint")
PHASE_LABELS = (*RUN_LABELS, "phase")
PHASE_SECONDS = Metric(
    "step_phase_seconds",
    "Seconds by phase: one observation per rank and step, and one per evaluation and checkpoint.",
    "run",
)
PHASE_BOUNDS_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

INFO = Metric(
    "run_info", "Effective zero_stage, sequence_parallel_size, world_size, dtype and device; value 1.", "run"
)
INFO_LABELS = (*RUN_LABELS, "zero_stage", "sequence_parallel_size", "world_size", "dtype", "device")


def sample_names() -> frozenset[str]:
    """Return all sample names that the endpoint can serve."""
    gauges = (*STEP_METRICS, *DEVICE_METRICS, *RUN_METRICS, INFO)
    names = {metric.name for metric in gauges}
    names |= {f"{metric.name}_total" for metric in (*COUNTERS, *RUN_COUNTERS)}
    names |= {f"{PHASE_SECONDS.name}_{part}" for part in ("bucket", "sum", "count")}
    return frozenset(PREFIX + name for name in names)
