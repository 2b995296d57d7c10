"""Results of a sweep: one row per cell in a JSON Lines file, so that a killed sweep can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orchestrator.atomic_files import read_lines
from orchestrator.errors import SpecError
from orchestrator.metrics.meter import PHASES, last_attempt

RESULTS = "results.jsonl"
STEPS, REPORT, WORKERS = "steps.jsonl", "report.json", "workers.json"  # files of a run directory
RATES = ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu")
SAMPLED = (*RATES, "step_seconds", *PHASES)
PEAKS = ("memory_peak_bytes", "memory_reserved_peak_bytes", "host_memory_peak_bytes")
Status = Literal["ok", "out_of_memory", "failed"]


@dataclass(frozen=True)
class Reading:
    """Statistics of a metric over the measured steps of a cell.

    Attributes:
        median: Median.
        low: Lower quartile.
        high: Upper quartile.
        count: Number of steps.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Reading:
        """Return the statistics of one or more values."""
        low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high, len(values))

    @property
    def spread(self) -> float:
        """Half the interquartile range divided by the median; 0 if the median is 0."""
        return (self.high - self.low) / 2.0 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Row:
    """Result of a cell.

    Attributes:
        cell: Name of its run.
        fields: Values of the fields that vary over the sweep.
        job: The job as it ran, including defaults.
        status: Whether it finished, ran out of memory, or failed for another reason.
        reason: Why it failed; None if it finished.
        samples: Values of every step after warm-up, by metric.
        peaks: Peak memory over the run of the worker with the most, by metric, in bytes.
        packing: Packing statistics, such as `documents` and `tokens_kept`.
        seconds: Wall-clock seconds by phase of the run.
        shape: Model dimensions; None for an unknown architecture.
        environment: Hardware and software that it ran on.
    """

    cell: str
    fields: Mapping[str, object]
    job: Mapping[str, object]
    status: Status
    reason: str | None = None
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    shape: Mapping[str, int] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """Return a field of the job by its dotted name; None if the job does not have it."""
        value: object = self.job
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def value(self, name: str) -> object:
        """Return a field's value as written in the sweep for this cell, or else from the job."""
        return self.fields[name] if name in self.fields else self.setting(name)

    def reading(self, name: str) -> Reading | None:
        """Return the statistics of a metric over the measured steps; None without samples."""
        values = self.samples.get(name)
        return Reading.of(values) if values else None


def label(fields: Mapping[str, object]) -> str:
    """Format fields as `name=value`, with the last part of each dotted name."""
    return ", ".join(f"{name.rpartition('.')[2]}={shown(value)}" for name, value in fields.items())


def shown(value: object) -> str:
    """Format a field's value: strings as they are, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def samples_of(run: Path, warmup_steps: int) -> dict[str, list[float]]:
    """Return the metrics of every step after warm-up, by name; metrics missing in a step are omitted.

    Args:
        run: The run directory.
        warmup_steps: Number of first steps to exclude.
    """
    rows = [row for row in _steps(run) if row["step"] > warmup_steps]
    return {
        name: [row[name] for row in rows]
        for name in SAMPLED
        if rows and all(_is_number(row.get(name)) for row in rows)
    }


def peaks_of(run: Path) -> dict[str, float]:
    """Return the peak memory of the worker with the most, by metric, in bytes."""
    rows = _steps(run)
    return {
        name: max(row[name] for row in rows)
        for name in PEAKS
        if rows and all(_is_number(row.get(name)) for row in rows)
    }


def _steps(run: Path) -> list[Mapping[str, float]]:
    """Return one row per step, from its last attempt; rows without step or attempt are ignored."""
    rows = [row for row in read_lines(run / STEPS) if _is_number(row.get("step"), row.get("attempt"))]
    return last_attempt(rows)


def _is_number(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def read(folder: Path) -> list[Row]:
    """Return the latest row of every cell of a sweep.

    Raises:
        SpecError: The folder has no results, or another version wrote them.
    """
    path = folder / RESULTS
    if not path.exists():
        raise SpecError(f"{folder} has no {RESULTS}; name the folder STORAGE/NAME of a sweep")
    try:
        rows = {line["cell"]: Row(**line) for line in read_lines(path)}
    except (KeyError, TypeError) as error:
        raise SpecError(f"{path} was written by another version ({error}); run the sweep again") from None
    return list(rows.values())


def append(folder: Path, row: Row) -> None:
    """Append a row, after terminating a line that was truncated when the process was killed."""
    path = folder / RESULTS
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(asdict(row)) + "\n")
