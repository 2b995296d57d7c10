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
    """

    name: str
    help: str
    scope: Literal["rank", "run"]


STEP_METRICS: tuple[Metric, ...] = (
    Metric("step", "Optimizer steps completed.", "run"),
    Metric("epoch", "Passes over the packs completed, as a fraction.", "run"),
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

RUN_METRICS: tuple[Metric, ...] = (
    Metric("evaluation_loss", "Cross-entropy in nats per trained token on the held-out rows.", "run"),
    Metric("restarts", "How often the worker group was started again.", "run"),
    Metric("steps_lost", "Steps that were done again after restarts.", "run"),
    Metric("steps_planned", "Optimizer steps of the whole run.", "run"),
    Metric("last_step_timestamp_seconds", "Unix time of the last completed step.", "run"),
    Metric("checkpoint_seconds", "Seconds that the last checkpoint took.", "run"),
)

COUNTERS: tuple[Metric, ...] = (
    Metric("processed_tokens", "Real tokens since the worker started.", "rank"),
    Metric("processed_flops", "FLOPs of the model's work since the worker started.", "rank"),
)

INFO = Metric(
    "run_info", "Effective zero_stage, sequence_parallel_size, world_size, dtype and device; value 1.", "run"
)
INFO_LABELS = (*RUN_LABELS, "zero_stage", "sequence_parallel_size", "world_size", "dtype", "device")
