"""Loads a sweep file: base jobs, the fields that vary, and the resulting cells.

    name: lengths
    base: ../quickstart.yaml          # one job file or a list of them; or `job:` with the job itself
    matrix: {data.max_length: [512, 1024], parallel.workers: [1, 2]}
    warmup_steps: 2
    steps: 10

Cells are the Cartesian product of bases, entries of `cells`, and combinations of `matrix`. All of them are
validated as jobs before the first one runs.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config import loader, yaml_loader
from orchestrator.config.field_types import Count, PathStr
from orchestrator.config.schema import JobSpec, Section
from orchestrator.errors import SpecError

Layout = Literal["plain", "xtuner", "qwen", "ms-swift", "llm-action", "llama2-lora"]
Values = dict[str, Any]
"""Values of a YAML file by field."""
_MOST_CELLS = 1000
_LONGEST_SLUG = 48  # a run's name has at most 63 characters, and the digest takes 9 of them


class SweepSpec(Section):
    """Schema of a sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the sweep; its folder is STORAGE/NAME."""
    layout: Layout = "plain"
    """Columns of the table: those of a published page, or plain."""
    base: PathStr | Annotated[tuple[PathStr, ...], Field(min_length=1)] | None = None
    """Job file, or several, relative to the sweep file."""
    job: Values | None = None
    """The job itself, instead of a base."""
    matrix: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Fields of the job by dotted name, each with the values that it takes; all combinations are run."""
    cells: Annotated[tuple[Values, ...], Field(min_length=1)] = ({},)
    """Fields that vary together: one entry a row, each a mapping of dotted names to values."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 2
    """Steps at the start of each cell whose figures are left out."""
    steps: Count | None = None
    """Steps that are measured after those; null leaves it to optim.max_steps and optim.epochs of the job."""
    memory_limit_gib: float | None = Field(default=None, gt=0.0)
    """Memory of its device that each worker may take, as if the device were smaller; on CPU what it may take
    on top of what its process holds before the model is built. null sets no limit."""
    timeout_minutes: float | None = Field(default=None, gt=0.0)
    """A cell that takes longer is ended, and its row says so; null waits."""
    storage: PathStr = "runs/bench"
    """Folder that every node can read and write."""


@dataclass(frozen=True)
class Cell:
    """One job of a sweep.

    Attributes:
        name: Name of its run: the values that vary, and a digest of the whole job.
        fields: Values of the fields that vary over the sweep.
        job: The job that is run.
    """

    name: str
    fields: Mapping[str, object]
    job: JobSpec


@dataclass(frozen=True)
class Sweep:
    """A sweep whose cells are all valid jobs."""

    spec: SweepSpec
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> Path:
        """Absolute path of the sweep's results."""
        return Path(self.spec.storage).expanduser().absolute() / self.spec.name


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        path: The YAML file.
        overrides: Settings such as `parallel.zero_stage=2` for the job of every cell.

    Returns:
        The sweep.

    Raises:
        SpecError: Lists every problem of the file, its bases and its cells.
    """
    data, source_lines, problems = yaml_loader.read(loader.text_of(path, "sweep"), path.name, "sweep")
    spec, broken = _validate(data, source_lines, path.name)
    if problems or spec is None:
        raise SpecError(*problems, *broken)
    bases = _bases(spec, data, source_lines, path, overrides)
    cells: dict[str, Cell] = {}
    found: dict[str, None] = {}  # an ordered set: most problems occur in many cells
    for base, (fields, written) in itertools.product(bases, _combinations(spec, source_lines, path.name)):
        job, broken = _job(base, fields, written)
        if job is None:
            found.update(dict.fromkeys(broken))
            continue
        cell = _cell(spec, job, fields, base.label if len(bases) > 1 else None)
        cells[cell.name] = cell
    if found:
        raise SpecError(*found)
    return Sweep(spec, tuple(cells.values()))


@dataclass(frozen=True)
class _Base:
    """A parsed job file before cells set their fields in it; `origin` is its name in errors."""

    label: str
    data: Values
    source_lines: yaml_loader.SourceLines
    origin: str


def _validate(
    data: Values, source_lines: yaml_loader.SourceLines, origin: str
) -> tuple[SweepSpec | None, list[str]]:
    problems = []
    try:
        spec = SweepSpec.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        # `base` is a union of a string and a list, so pydantic reports an error for each: keep the first.
        first: dict[yaml_loader.Location, ErrorDetails] = {}
        for detail in error.errors(include_url=False):
            first.setdefault(detail["loc"][:1] if detail["loc"][0] == "base" else detail["loc"], detail)
        return None, [
            f"{yaml_loader.line_of(source_lines, [at], origin)}: "
            + loader.message_of({**detail, "loc": at}, SweepSpec, "sweep")
            for at, detail in first.items()
        ]
    if (spec.base is None) == (spec.job is None):
        how = "neither base nor job" if spec.base is None else "both base and job"
        problems.append(f"{origin}: the sweep has {how}; write base: JOB.yaml, or the job itself below job:")
    for index, cell in enumerate(spec.cells):
        for name in cell.keys() & spec.matrix.keys():
            where = yaml_loader.line_of(source_lines, [("cells", index, name)], origin)
            problems.append(f"{where}: {name} is in cells and in matrix; vary it in one of them")
    count = len(spec.cells) * len(_base_names(spec))
    for values in spec.matrix.values():
        count *= len(values)
    if count > _MOST_CELLS:
        problems.append(f"{origin}: the sweep has {count} cells; at most {_MOST_CELLS} are run, so split it")
    return (None if problems else spec), problems


def _base_names(spec: SweepSpec) -> tuple[str, ...]:
    if spec.base is None:
        return ("",)
    return (spec.base,) if isinstance(spec.base, str) else spec.base


def _bases(
    spec: SweepSpec,
    data: Values,
    source_lines: yaml_loader.SourceLines,
    path: Path,
    overrides: Sequence[str],
) -> list[_Base]:
    """Read the job files, or the job in the sweep file, and apply the overrides to each."""
    problems: list[str] = []
    bases = []
    for name in _base_names(spec):
        if name:
            file = path.parent / Path(name).expanduser()
            try:
                job, where, twice = yaml_loader.read(loader.text_of(file, "job"), file.name)
            except SpecError as error:
                named = yaml_loader.line_of(source_lines, [("base",)], path.name)
                problems += [f"{named}: {problem}" for problem in error.problems]
                continue
            base = _Base(file.stem, job, where, file.name)
        else:
            below = {key[1:]: line for key, line in source_lines.items() if key[0] == "job" and len(key) > 1}
            base, twice = _Base(spec.name, dict(data["job"]), below, path.name), []
        problems += twice
        problems += [
            p for text in overrides if (p := loader.apply_override(base.data, base.source_lines, text))
        ]
        bases.append(base)
    if problems:
        raise SpecError(*problems)
    return bases


def _combinations(
    spec: SweepSpec, source_lines: yaml_loader.SourceLines, origin: str
) -> Iterator[tuple[Values, dict[str, str]]]:
    """Yield the fields of every cell, and the source line of each field."""
    for index, listed in enumerate(spec.cells):
        for chosen in itertools.product(*(range(len(values)) for values in spec.matrix.values())):
            picked = dict(zip(spec.matrix, chosen, strict=True))
            fields = {**listed, **{name: spec.matrix[name][at] for name, at in picked.items()}}
            locations: dict[str, yaml_loader.Location] = {name: ("cells", index, name) for name in listed}
            locations |= {name: ("matrix", name, at) for name, at in picked.items()}
            yield fields, {n: yaml_loader.line_of(source_lines, [at], origin) for n, at in locations.items()}


def _job(base: _Base, fields: Values, written: Mapping[str, str]) -> tuple[JobSpec | None, list[str]]:
    data, source_lines = copy.deepcopy(base.data), dict(base.source_lines)
    problems = []
    for name, value in fields.items():
        reason = loader.put(data, source_lines, name, value, written[name])
        if reason:
            problems.append(f"{written[name]}: {name}: {reason}")
    if problems:
        return None, problems
    return loader.validate(data, source_lines, base.origin)


def _cell(spec: SweepSpec, job: JobSpec, fields: Values, base: str | None) -> Cell:
    """Return a cell whose job is changed for measurement: no restarts, checkpoints or metrics endpoint."""
    steps = job.optim.max_steps if spec.steps is None else spec.warmup_steps + spec.steps
    changed = job.model_copy(
        update={
            "optim": job.optim.model_copy(update={"max_steps": steps}),
            "run": job.run.model_copy(update={"max_failures": 0}),
            "metrics": job.metrics.model_copy(update={"port": None}),
            "checkpoint": job.checkpoint.model_copy(
                update={"storage": str(Path(spec.storage) / spec.name / "cells"), "every_steps": None}
            ),
        }
    )
    shown = ({"job": base} if base else {}) | dict(_flat(fields))
    name = f"{_slug(shown)}-{_digest(spec, changed)}"
    return Cell(name, shown, changed.model_copy(update={"name": name}))


def _digest(spec: SweepSpec, job: JobSpec) -> str:
    """Return 8 hex digits of a hash over all that affects the results, excluding name and storage."""
    content = job.model_dump(mode="json", exclude={"name": True, "checkpoint": {"storage"}})
    content["sweep"] = [spec.warmup_steps, spec.memory_limit_gib]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield fields by dotted name, flattening sections."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _slug(fields: Values) -> str:
    parts = []
    for name, value in fields.items():
        shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        last = shown.rpartition("/")[2]
        parts.append(last if name == "job" else f"{name.rpartition('.')[2]}-{last}")
    text = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-._")
    return text[:_LONGEST_SLUG].rstrip("-._") or "cell"
