"""From what one step did and how long it took to the numbers that are published. Pure arithmetic.

Definitions: tokens are real tokens, never padding; seconds are wall seconds of the optimizer step, the same
for all ranks, without evaluation and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

Values = dict[str, float]


@dataclass(frozen=True)
class RankStep:
    """What one rank did in one step; travels between ranks as a vector of its fields.

    Attributes:
        loss_sum: Summed cross-entropy in nats.
        tokens: Real tokens.
        trained_tokens: Targets of the loss.
        slots: Positions including padding.
        flops_model: FLOPs asked for; 0 where the architecture's are not known.
        flops_hardware: FLOPs done; likewise.
        data_seconds: Seconds of making batches.
        forward_seconds: Seconds of forward passes.
        backward_seconds: Seconds of backward passes.
        optimizer_seconds: Seconds of the optimizer.
        memory_bytes: Memory in use.
        memory_peak_bytes: Largest memory in use so far.
        memory_reserved_bytes: Memory held by the allocator.
        memory_reserved_peak_bytes: Largest memory held by the allocator so far.
        host_memory_peak_bytes: Largest resident memory of the process so far.
    """

    loss_sum: float
    tokens: float
    trained_tokens: float
    slots: float
    flops_model: float
    flops_hardware: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    memory_bytes: float
    memory_peak_bytes: float
    memory_reserved_bytes: float
    memory_reserved_peak_bytes: float
    host_memory_peak_bytes: float

    def vector(self) -> list[float]:
        """Return the fields in order."""
        return [float(getattr(self, field.name)) for field in fields(self)]

    @classmethod
    def of_vector(cls, vector: Sequence[float]) -> RankStep:
        """Return what `vector` was made of."""
        return cls(*vector)


PHASES = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
MEMORY = (
    "memory_bytes",
    "memory_peak_bytes",
    "memory_reserved_bytes",
    "memory_reserved_peak_bytes",
    "host_memory_peak_bytes",
)


def rank_values(step: RankStep, seconds: float, peak_flops: float | None) -> Values:
    """Return one rank's published numbers.

    Args:
        step: What the rank did.
        seconds: Wall seconds of the step.
        peak_flops: Dense peak of the rank's device in FLOP/s; None leaves MFU and HFU out.
    """
    values = {
        "tgs": step.tokens / seconds,
        "tgs_trained": step.trained_tokens / seconds,
        "tgs_slots": step.slots / seconds,
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        **{name: getattr(step, name) for name in (*PHASES, *MEMORY)},
    }
    if step.flops_model:
        values["tflops_model"] = step.flops_model / seconds / 1e12
        values["tflops_hardware"] = step.flops_hardware / seconds / 1e12
        if peak_flops:
            values["mfu"] = step.flops_model / seconds / peak_flops
            values["hfu"] = step.flops_hardware / seconds / peak_flops
    return values


def step_values(steps: Sequence[RankStep], seconds: float, peak_flops: Sequence[float | None]) -> Values:
    """Return the step's numbers over all ranks.

    Rates are means over ranks, so that they stay per GPU; tokens are sums; phases and memory are those of the
    slowest and of the fullest rank, which a mean would hide.

    Args:
        steps: What each rank did, by rank.
        seconds: Wall seconds of the step.
        peak_flops: Dense peak of each rank's device, or None.
    """
    each = [rank_values(step, seconds, peak) for step, peak in zip(steps, peak_flops, strict=True)]
    trained = sum(step.trained_tokens for step in steps)
    values = {
        "loss": sum(step.loss_sum for step in steps) / trained if trained else 0.0,
        "step_seconds": seconds,
        "padding_fraction": 1.0 - sum(step.tokens for step in steps) / sum(step.slots for step in steps),
    }
    # A rank whose packs lie past the end of the data did no work: it counts as 0 and hides no other.
    busy = [rank for rank in each if rank["tokens"]]
    for name in ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu"):
        if busy and all(name in rank for rank in busy):
            values[name] = sum(rank.get(name, 0.0) for rank in each) / len(each)
    for name in ("tokens", "trained_tokens"):
        values[name] = sum(rank[name] for rank in each)
    for name in (*PHASES, *MEMORY):
        values[name] = max(rank[name] for rank in each)
    return values


def eta_seconds(step: int, steps: int, recent_step_seconds: Sequence[float]) -> float:
    """Return the seconds that the remaining steps take at the median pace of recent ones."""
    ordered = sorted(recent_step_seconds)
    return (steps - step) * ordered[len(ordered) // 2] if ordered else 0.0


def last_attempt(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return one row a step: a step that was done again after a restart counts as its last attempt says."""
    by_step: dict[float, Mapping[str, float]] = {}
    for row in rows:
        known = by_step.get(row["step"])
        if known is None or row["attempt"] >= known["attempt"]:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]
