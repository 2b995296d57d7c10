"""Compares every parallel layout with single-process training.

    python -m tests.invariant.matrix                       all cells
    python -m tests.invariant.matrix --stage 3 --sample 50 fifty random cells of ZeRO-3

`test_sequence_parallel.py` runs a pairwise cover of the same cells.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from tests.invariant import material, reference
from tests.invariant.group import Outcome, has_outcome, outcome_of, run_group, worst_difference

STEPS = 2
CELLS_IN_A_GROUP = 24
AXES: dict[str, tuple[Any, ...]] = {
    "zero": ("0", "1", "2", "3", "1-all-reduce", "2-all-reduce", "3-all-reduce"),
    "sequence_parallel_size": (1, 2, 4),
    "data_parallel_size": (1, 2),
    "packing": ("best_fit", "none"),
    "kv_heads": (1, 2, 4),
    "accumulation": (1, 3),
    "labels": ("everywhere", "late"),
}
"""Values of each axis. ZeRO stages 1 to 3 run with reduce_scatter and with all-reduce. With `late` labels,
the workers with the first half of a row have no label."""
LIMITS = {"loss": 1e-5, "gradient": 1e-4, "gradient_norm": 1e-4, "parameter": 1e-4, "evaluation": 1e-5}
"""Largest relative errors; for tensors, of the L2 norm."""


@dataclass(frozen=True)
class Cell:
    """One combination of the axes' values, and the loss tile in tokens."""

    zero: str
    sequence_parallel_size: int
    data_parallel_size: int
    packing: str
    kv_heads: int
    accumulation: int
    labels: str
    tile: int | None = None

    def __str__(self) -> str:
        tile = f"-tile{self.tile}" if self.tile else ""
        return "zero{}-sp{}-dp{}-{}-kv{}-acc{}-{}".format(*astuple(self)) + tile

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.zero[0])

    @property
    def workers(self) -> int:
        """World size."""
        return self.sequence_parallel_size * self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Packs of one optimizer step."""
        return self.data_parallel_size * self.accumulation


EXTRA = (
    Cell("3", 2, 1, "concat", 1, 1, "everywhere"),
    Cell("2", 4, 1, "best_fit", 8, 1, "everywhere"),
    Cell("3", 2, 1, "best_fit", 2, 1, "everywhere", tile=7),
)


@dataclass(frozen=True)
class Verdict:
    """Relative errors of a cell by kind, and the problems found."""

    cell: Cell
    errors: dict[str, float]
    problems: tuple[str, ...]


def all_cells() -> list[Cell]:
    """Return every combination of the axes, and the extra cells."""
    return [*(Cell(*values) for values in product(*AXES.values())), *EXTRA]


class Bench:
    """Runs cells and compares them with the reference; keeps models and documents in one folder."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._references: dict[tuple[Any, ...], reference.Reference] = {}
        self._groups = 0
        for kv_heads in (*AXES["kv_heads"], 8):
            material.write_model(home / f"kv{kv_heads}", num_key_value_heads=kv_heads)
        material.write_documents(home / "everywhere", 40, seed=1)
        material.write_documents_with_late_labels(home / "late", 40, seed=4)
        material.write_documents(home / "held-out", 6, seed=2)

    def verdicts(self, cells: Iterable[Cell]) -> Iterator[Verdict]:
        """Run cells in groups of the same world size, and yield a verdict for each."""
        by_size: dict[int, list[Cell]] = {}
        for cell in cells:
            by_size.setdefault(cell.workers, []).append(cell)
        for _, alike in sorted(by_size.items()):
            for start in range(0, len(alike), CELLS_IN_A_GROUP):
                yield from self._run(alike[start : start + CELLS_IN_A_GROUP])

    def _run(self, cells: Sequence[Cell]) -> Iterator[Verdict]:
        """Run cells of one world size in one group; after a failing or hanging cell, start a new group."""
        workers, names = cells[0].workers, [str(cell) for cell in cells]
        folder = self._home / f"group-{self._groups}"
        self._groups += 1
        failure = ""
        try:
            run_group(folder, workers, [self._task(cell) for cell in cells], 120 + 4 * workers * len(cells))
        except AssertionError as error:
            failure = str(error)
        done = [has_outcome(folder, name, workers) for name in names]
        # If the group fails after its last cell, that cell counts as failed.
        finished = [*done[:-1], False].index(False) if failure else len(cells)
        for cell in cells[:finished]:
            yield self._judge(cell, outcome_of(folder, str(cell), workers))
        if finished < len(cells):
            yield Verdict(cells[finished], {}, (failure,))
            if cells[finished + 1 :]:
                yield from self._run(cells[finished + 1 :])

    def _task(self, cell: Cell) -> dict[str, Any]:
        parallel = {"zero_stage": cell.stage, "sequence_parallel_size": cell.sequence_parallel_size}
        document = material.job(
            self._home / f"kv{cell.kv_heads}", cell.workers, parallel,
            model={"loss_tile_tokens": cell.tile}, data={"packing": cell.packing}, eval={"every_steps": None},
            global_batch_size=cell.global_batch_size, max_steps=STEPS,
        )  # fmt: skip
        document["eval"] = {"data": [{"path": "unused"}]}
        return {
            "name": str(cell),
            "action": "train",
            "job": document,
            "data": str(self._home / cell.labels),
            "held_out": str(self._home / "held-out"),
            "parameters": True,
            "zero_optimization": {"reduce_scatter": False} if "all-reduce" in cell.zero else {},
        }

    def _reference(self, cell: Cell) -> reference.Reference:
        """Return the cached single-process result, which depends on neither ZeRO nor sequence parallelism."""
        key = (cell.packing, cell.kv_heads, cell.global_batch_size, cell.labels)
        if key not in self._references:
            held_out = self._home / "held-out"
            document = self._task(cell)["job"]
            self._references[key] = reference.train(document, self._home / cell.labels, held_out)
        return self._references[key]

    def _judge(self, cell: Cell, outcome: Outcome) -> Verdict:
        expected, steps = self._reference(cell), outcome.answer["steps"]
        evaluations = [answer["evaluations"][-1][1] for answer in outcome.ranks]
        errors = {
            "loss": _worst([step["loss"] for step in steps], expected.losses),
            "gradient": worst_difference(outcome.kind("gradient"), expected.gradients)[1],
            "gradient_norm": _worst([step["gradient_norm"] for step in steps], expected.gradient_norms),
            "parameter": worst_difference(outcome.kind("parameter"), expected.parameters)[1],
            "evaluation": _worst(evaluations, [expected.evaluation] * cell.workers),
        }
        problems = [
            f"{kind} is off by {error:.2e}, and {LIMITS[kind]:.0e} is allowed"
            for kind, error in errors.items()
            if not error <= LIMITS[kind]  # true for NaN as well
        ]
        trained = [step["trained_tokens"] for step in steps]
        if not all(map(sum, trained)):
            problems.append(f"a step has no label at all: {trained}")
        if (
            cell.labels == "late"
            and cell.sequence_parallel_size > 1
            and not all(0 in each for each in trained)
        ):
            problems.append(f"every worker has a label: {trained}")
        return Verdict(cell, errors, tuple(problems))


def _worst(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative error, or NaN if one of them is NaN."""
    errors = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: (error != error, error))


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return a table of the largest error of each kind, for each value of each axis."""
    lines = [f"{'axis':24}{'value':>14}{'cells':>7}{'failed':>7}" + "".join(f"{kind:>15}" for kind in LIMITS)]
    for axis in ("all", *(field.name for field in fields(Cell))):
        choose: Callable[[Verdict], Any] = lambda each, axis=axis: getattr(each.cell, axis, "")  # noqa: E731
        for value in sorted({choose(each) for each in verdicts}, key=str):
            mine = [each for each in verdicts if choose(each) == value]
            worst = [max((each.errors.get(kind, 0.0) for each in mine), default=0.0) for kind in LIMITS]
            failed = sum(bool(each.problems) for each in mine)
            figures = "".join(f"{error:15.1e}" for error in worst)
            lines.append(f"{axis:24}{value!s:>14}{len(mine):7}{failed:7}{figures}")
    return "\n".join(lines)


def _environment() -> str:
    packages = ("torch", "deepspeed", "transformers", "numpy")
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)


def main(arguments: Sequence[str]) -> int:
    """Run the cells that the arguments select; return 1 if one fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.invariant.matrix", description=__doc__)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="only cells of this ZeRO stage")
    parser.add_argument("--sample", type=int, help="number of cells, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(arguments)
    cells = [cell for cell in all_cells() if options.stage in (None, cell.stage)]
    if options.sample is not None and options.sample < len(cells):
        cells = random.Random(options.seed).sample(cells, options.sample)
    started, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as home:
        for verdict in Bench(Path(home)).verdicts(cells):
            verdicts.append(verdict)
            for problem in verdict.problems:
                sys.stdout.write(f"FAILED {verdict.cell}: {problem}\n")
            sys.stdout.flush()
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(f"{summary(verdicts)}\n{len(verdicts)} cells, {failed} failed, {minutes:.1f} minutes\n")
    sys.stdout.write(f"{_environment()}\nlimits {json.dumps(LIMITS)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
