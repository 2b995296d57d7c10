"""Computes published metrics from the raw measurements of a step. Pure functions.

Tokens are real tokens without padding; seconds are wall-clock seconds of the optimizer step, the same for all
ranks, without evaluation and checkpoints.
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
    """Measurements of one rank in one step; gathered between ranks as a vector of its fields.

    Attributes:
        loss_sum: Sum of the cross-entropy in nats.
        tokens: Real tokens.
        trained_tokens: Tokens with a label.
        slots: Tokens including padding.
        flops_model: Model FLOPs; 0 for an unknown architecture.
        flops_hardware: Hardware FLOPs including recomputation; 0 for an unknown architecture.
        data_seconds: Seconds spent preparing batches.
        forward_seconds: Seconds of forward passes.
        backward_seconds: Seconds of backward passes.
        optimizer_seconds: Seconds of the optimizer.
        memory_bytes: Memory in use.
        memory_peak_bytes: Peak memory in use.
        memory_reserved_bytes: Memory held by the allocator.
        memory_reserved_peak_bytes: Peak memory held by the allocator.
        host_memory_peak_bytes: Peak resident set size of the process.
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
    """Measurements of all ranks in one step as one array, without an object per rank.

    Attributes:
        rows: Array of shape (world_size, fields of `RankStep`).
    """

    rows: FloatArray

    @classmethod
    def of(cls, steps: Iterable[RankStep]) -> RankSteps:
        """Build the array from one `RankStep` per rank."""
        return cls(np.array([step.vector() for step in steps]).reshape(-1, len(_FIELDS)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RankStep]:
        return (RankStep(*row) for row in self.rows.tolist())

    def column(self, name: str) -> FloatArray:
        """Return a field of all ranks, shape (world_size,)."""
        return self.rows[:, _FIELDS.index(name)]

    @property
    def loss(self) -> float:
        """Mean cross-entropy per trained token in nats; 0 without trained tokens."""
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
    """Return the dense peak of each rank's device in FLOP/s, shape (world_size,); NaN if unknown."""
    return np.array([np.nan if peak is None else peak for peak in peak_flops], dtype=np.float64)


def rank_columns(steps: RankSteps, seconds: float, peak_flops: FloatArray) -> dict[str, FloatArray]:
    """Return the per-rank metrics by name, arrays of shape (world_size,); NaN if unknown.

    Args:
        steps: Measurements of all ranks.
        seconds: Wall-clock seconds of the step.
        peak_flops: Result of `peaks`; MFU and HFU are NaN if the peak is NaN.

    Raises:
        ValueError: The number of peaks is not the world size.
    """
    if len(steps) != len(peak_flops):
        raise ValueError(f"{len(steps)} ranks and {len(peak_flops)} peaks: pass one peak per rank")
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
    """Return the per-run metrics of a step.

    Rates per GPU are means over ranks and tokens are sums. Phase seconds and memory are maxima over ranks,
    because a mean would hide the slowest and the fullest rank.

    Args:
        steps: Measurements of all ranks.
        seconds: Wall-clock seconds of the step.
        peak_flops: Result of `peaks`.
    """
    columns = rank_columns(steps, seconds, peak_flops)
    values = {
        "loss": steps.loss,
        "step_seconds": seconds,
        "padding_fraction": float(1.0 - columns["tokens"].sum() / steps.column("slots").sum()),
    }
    # A rank past the end of the data has no packs and counts as 0; its NaN MFU must not hide the others.
    busy = columns["tokens"] > 0
    for name in ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu"):
        if busy.any() and not np.isnan(columns[name][busy]).any():
            values[name] = float(np.nan_to_num(columns[name]).mean())
    for name in ("tokens", "trained_tokens"):
        values[name] = float(columns[name].sum())
    for name in (*PHASES, *MEMORY):
        values[name] = float(columns[name].max())
    return values


def eta_seconds(step: int, steps: int, recent_step_seconds: Sequence[float]) -> float:
    """Return the estimated seconds of the remaining steps at the median pace of recent steps."""
    ordered = sorted(recent_step_seconds)
    return (steps - step) * ordered[len(ordered) // 2] if ordered else 0.0


def last_attempt(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return one row per step; of a step repeated after a restart, the row of the last attempt."""
    by_step: dict[float, Mapping[str, float]] = {}
    for row in rows:
        known = by_step.get(row["step"])
        if known is None or row["attempt"] >= known["attempt"]:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]
