"""Results of a sweep: one row a cell, kept as JSON lines, so that a sweep that was killed goes on."""

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
STEPS, REPORT, WORKERS = "steps.jsonl", "report.json", "workers.json"  # of a run's folder
RATES = ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu")
SAMPLED = (*RATES, "step_seconds", *PHASES)
PEAKS = ("memory_peak_bytes", "memory_reserved_peak_bytes", "host_memory_peak_bytes")
Status = Literal["ok", "out_of_memory", "failed"]


@dataclass(frozen=True)
class Reading:
    """A quantity over the steps of a cell.

    Attributes:
        median: Its median.
        low: Its lower quartile.
        high: Its upper quartile.
        count: Steps.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Reading:
        """Return the reading of some values, at least one."""
        low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high, len(values))

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / 2.0 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Row:
    """What became of a cell.

    Attributes:
        cell: Name of its run.
        fields: The fields that vary over the sweep, and their values here.
        job: The job as it ran, with every default.
        status: Whether it ran, ran out of memory, or failed in another way.
        reason: Why it did not run.
        samples: Values of every step after warm-up, by name.
        peaks: Largest memory of the fullest worker, by name, in bytes; over the whole run.
        packing: What became of the rows; `documents` and `tokens_kept` among others.
        seconds: Wall seconds by part of the run.
        shape: The model's sizes, where its architecture is known.
        environment: What it ran on.
    """

    cell: str
    fields: Mapping[str, Any]
    job: Mapping[str, Any]
    status: Status
    reason: str | None = None
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    shape: Mapping[str, int] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """Return a field of the job by its dotted name; None where the job has none of that name."""
        value: Any = self.job
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def value(self, name: str) -> Any:
        """Return a field that varies over the sweep: as written for this cell, or as its job has it."""
        return self.fields[name] if name in self.fields else self.setting(name)

    def reading(self, name: str) -> Reading | None:
        """Return a quantity over the measured steps; None where there is none."""
        values = self.samples.get(name)
        return Reading.of(values) if values else None


def label(fields: Mapping[str, Any]) -> str:
    """Return fields as a person reads them: the last part of each name, and its value."""
    return ", ".join(f"{name.rpartition('.')[2]}={shown(value)}" for name, value in fields.items())


def shown(value: Any) -> str:
    """Return the value of a field as a person reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def samples_of(run: Path, warmup_steps: int) -> dict[str, list[float]]:
    """Return what a run measured in each step after warm-up.

    Args:
        run: The run's folder.
        warmup_steps: Steps at its start that are left out.
    """
    rows = [row for row in _steps(run) if row["step"] > warmup_steps]
    return {
        name: [row[name] for row in rows]
        for name in SAMPLED
        if rows and all(_is_number(row.get(name)) for row in rows)
    }


def peaks_of(run: Path) -> dict[str, float]:
    """Return the largest memory that any worker of a run took, by name, in bytes."""
    rows = _steps(run)
    return {
        name: max(row[name] for row in rows)
        for name in PEAKS
        if rows and all(_is_number(row.get(name)) for row in rows)
    }


def _steps(run: Path) -> list[Mapping[str, Any]]:
    """Return one row for each step of a run; rows that do not say their step and attempt are no steps."""
    rows = [row for row in read_lines(run / STEPS) if _is_number(row.get("step"), row.get("attempt"))]
    return last_attempt(rows)


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def read(folder: Path) -> list[Row]:
    """Return the rows of a sweep, of a cell that was run again the last.

    Raises:
        SpecError: The folder holds no results, or those of another version.
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
    """Add a row; a line that a kill cut short is ended first."""
    path = folder / RESULTS
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(asdict(row)) + "\n")
