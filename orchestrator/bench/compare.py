"""Compares two runs or two sweeps, and tests whether they differ by more than step-to-step noise.

The result is a 95 % confidence interval of the ratio of medians, from a bootstrap over steps. Neighbouring
steps are correlated, so blocks of them are resampled (Politis and Romano, A circular
block-resampling procedure for stationary data, 1992), as long as the cube root of the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.bench import results
from orchestrator.bench.results import label
from orchestrator.bench.table import Column, Table, Value
from orchestrator.errors import SpecError

_FEWEST_STEPS = 5
_DRAWS = 4000
_SEED = 1024
_STEPS = {"tgs": ("TGS", "tokens/GPU/s"), "step_seconds": ("step", "s")}
_MEMORY = {
    "memory_peak_bytes": ("peak allocated", "MiB"),
    "memory_reserved_peak_bytes": ("peak reserved", "MiB"),
    "host_memory_peak_bytes": ("peak host memory", "MiB"),
}


@dataclass(frozen=True)
class Measured:
    """Metrics of a run: values per step, and one value per run, by name."""

    samples: Mapping[str, Sequence[float]]
    peaks: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """B over A.

    Attributes:
        ratio: Ratio of the medians.
        low: Lower end of its 95 % confidence interval; None with too few steps.
        high: Upper end.
    """

    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference exceeds the noise, as text."""
        if self.low is None or self.high is None:
            return f"not known: fewer than {_FEWEST_STEPS} steps"
        if self.low <= 1.0 <= self.high:
            return "within the noise"
        return f"B is {abs(self.ratio - 1.0):.1%} {'higher' if self.ratio > 1.0 else 'lower'}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare the values of the steps of two runs.

    Args:
        a: Values of the first, in the order of the steps.
        b: Values of the second.
    """
    ratio = float(np.median(b) / np.median(a))
    if min(len(a), len(b)) < _FEWEST_STEPS:
        return Difference(ratio, None, None)
    generator = np.random.default_rng(_SEED)
    ratios = _medians(b, generator) / _medians(a, generator)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return Difference(ratio, low, high)


def _medians(values: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return medians of circular block resamples."""
    series = np.asarray(values, dtype=np.float64)
    block = max(1, round(len(series) ** (1 / 3)))
    starts = generator.integers(0, len(series), (_DRAWS, -(-len(series) // block), 1))
    places = (starts + np.arange(block)).reshape(_DRAWS, -1)[:, : len(series)] % len(series)
    medians: NDArray[np.float64] = np.median(series[places], axis=1)
    return medians


def compare(a: Path, b: Path, warmup_steps: int) -> Table:
    """Compare two runs, or the cells that two sweeps have in common.

    Args:
        a: Folder of a run or of a sweep.
        b: Folder of another of the same kind.
        warmup_steps: Steps at the start of a run that are left out; sweeps have left out theirs.

    Raises:
        SpecError: A folder holds neither, or the two have nothing in common.
    """
    first, second = measured(a, warmup_steps), measured(b, warmup_steps)
    common = [name for name in first if name in second]
    if not common:
        raise SpecError(
            f"{a} and {b} have no cell in common that ran in both; compare sweeps of the same cells"
        )
    columns = (
        Column("cell"),
        Column("quantity"),
        Column("unit"),
        Column("A", form="{:.5g}"),
        Column("B", form="{:.5g}"),
        Column("B / A", form="{:.4f}"),
        Column("95 % low", form="{:.4f}"),
        Column("95 % high", form="{:.4f}"),
        Column("verdict"),
    )
    body = [line for name in common for line in _lines(name, first[name], second[name])]
    kept = len(columns) - (0 if any(common) else 1)  # two runs have no cells to name
    left_out = len(first.keys() ^ second.keys())
    notes = [
        f"A: {a}; B: {b}. Medians over steps, the interval by block bootstrap over the steps of each run. It "
        "holds what varies from step to step; what differs from one start to the next (placement, other "
        "users, heat) it cannot hold: repeat both to see that.",
        "Peaks of memory are one reading a run, so their noise is not known.",
        *([f"{left_out} cells ran in one of the two only, and are left out."] if left_out else []),
    ]
    return Table("A and B", columns[-kept:], [line[-kept:] for line in body], notes)


def measured(folder: Path, warmup_steps: int) -> dict[str, Measured]:
    """Return what a run measured, under the empty name, or each cell of a sweep that ran, under its fields.

    Raises:
        SpecError: The folder holds neither.
    """
    if (folder / results.RESULTS).exists():
        rows = results.read(folder)
        return {
            label(row.fields) or row.cell: Measured(row.samples, row.peaks) for row in rows if row.samples
        }
    samples = results.samples_of(folder, warmup_steps)
    if not samples:
        raise SpecError(
            f"{folder} holds no sweep and no run with more than {warmup_steps} steps; name STORAGE/NAME of "
            "one, or lower --warmup-steps"
        )
    return {"": Measured(samples, results.peaks_of(folder))}


def _lines(name: str, a: Measured, b: Measured) -> list[tuple[Value, ...]]:
    lines: list[tuple[Value, ...]] = []
    for key, (quantity, unit) in _STEPS.items():
        if a.samples.get(key) and b.samples.get(key):
            found = difference(a.samples[key], b.samples[key])
            medians = (float(np.median(each.samples[key])) for each in (a, b))
            lines.append((name, quantity, unit, *medians, found.ratio, found.low, found.high, found.verdict))
    for key, (quantity, unit) in _MEMORY.items():
        if key in a.peaks and key in b.peaks:
            sizes = [each.peaks[key] / 2**20 for each in (a, b)]
            lines.append((name, quantity, unit, *sizes, sizes[1] / sizes[0], None, None, "one reading each"))
    return lines
