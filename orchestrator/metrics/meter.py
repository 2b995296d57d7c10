"""From what one step did and how long it took to the numbers that are published. Pure arithmetic.

Definitions: tokens are real tokens, never padding; seconds are wall seconds of the optimizer step, the same
for all ranks, without evaluation and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Values = dict[str, float]
FloatArray = NDArray[np.float64]


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


_FIELDS = tuple(field.name for field in fields(RankStep))


@dataclass(frozen=True)
class RankSteps:
    """What every rank did in one step, as one array: thousands of ranks cost the loop no objects.

    Attributes:
        rows: One row a rank, its columns the fields of `RankStep`.
    """

    rows: FloatArray

    @classmethod
    def of(cls, steps: Iterable[RankStep]) -> RankSteps:
        """Return steps that are given one by one."""
        return cls(np.array([step.vector() for step in steps]).reshape(-1, len(_FIELDS)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RankStep]:
        return (RankStep(*row) for row in self.rows.tolist())

    def column(self, name: str) -> FloatArray:
        """Return a field of all ranks, by rank."""
        return self.rows[:, _FIELDS.index(name)]

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the step's trained tokens; 0 where there is none."""
        trained = self.column("trained_tokens").sum()
        return float(self.column("loss_sum").sum() / trained) if trained else 0.0


PHASES = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
MEMORY = (
    "memory_bytes",
    "memory_peak_bytes",
    "memory_reserved_bytes",
    "memory_reserved_peak_bytes",
    "host_memory_peak_bytes",
)


def peaks(peak_flops: Iterable[float | None]) -> FloatArray:
    """Return the dense peak of each rank's device in FLOP/s, NaN where it is not known."""
    return np.array([np.nan if peak is None else peak for peak in peak_flops], dtype=np.float64)


def rank_columns(steps: RankSteps, seconds: float, peak_flops: FloatArray) -> dict[str, FloatArray]:
    """Return the published numbers of all ranks, by name and rank; NaN is what is not known.

    Args:
        steps: What each rank did.
        seconds: Wall seconds of the step.
        peak_flops: As `peaks` returns it; MFU and HFU are left out where it is NaN.

    Raises:
        ValueError: There are not as many peaks as ranks.
    """
    if len(steps) != len(peak_flops):
        raise ValueError(f"{len(steps)} ranks and {len(peak_flops)} peaks: give one for each rank")
    known = steps.column("flops_model") > 0
    model, hardware = (
        np.where(known, steps.column(name), np.nan) / seconds for name in ("flops_model", "flops_hardware")
    )
    return {
        "tgs": steps.column("tokens") / seconds,
        "tgs_trained": steps.column("trained_tokens") / seconds,
        "tgs_slots": steps.column("slots") / seconds,
        **{name: steps.column(name) for name in ("tokens", "trained_tokens", *PHASES, *MEMORY)},
        "tflops_model": model / 1e12,
        "tflops_hardware": hardware / 1e12,
        "mfu": model / peak_flops,
        "hfu": hardware / peak_flops,
    }


def step_values(steps: RankSteps, seconds: float, peak_flops: FloatArray) -> Values:
    """Return the step's numbers over all ranks.

    Rates are means over ranks, so that they stay per GPU; tokens are sums; phases and memory are those of the
    slowest and of the fullest rank, which a mean would hide.

    Args:
        steps: What each rank did.
        seconds: Wall seconds of the step.
        peak_flops: As `peaks` returns it.
    """
    each = rank_columns(steps, seconds, peak_flops)
    values = {
        "loss": steps.loss,
        "step_seconds": seconds,
        "padding_fraction": float(1.0 - each["tokens"].sum() / steps.column("slots").sum()),
    }
    # A rank whose packs lie past the end of the data did no work: it counts as 0 and hides no other.
    busy = each["tokens"] > 0
    for name in ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu"):
        if busy.any() and not np.isnan(each[name][busy]).any():
            values[name] = float(np.nan_to_num(each[name]).mean())
    for name in ("tokens", "trained_tokens"):
        values[name] = float(each[name].sum())
    for name in (*PHASES, *MEMORY):
        values[name] = float(each[name].max())
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
