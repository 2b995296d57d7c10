"""A sweep file yields valid jobs, or all its errors with their source lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.bench.sweep import Sweep, load
from orchestrator.errors import SpecError

JOB = """\
name: base
model: {path: builtin/tiny-llama}
data: {train: [{path: builtin/alpaca_sample}], max_length: 512}
"""


def sweep(folder: Path, text: str, *overrides: str) -> Sweep:
    (folder / "job.yaml").write_text(JOB)
    (folder / "sweep.yaml").write_text(text)
    return load(folder / "sweep.yaml", overrides)


def problems(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        sweep(folder, text, *overrides)
    return caught.value.problems


def values(found: Sweep, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(cell.fields.get(name) for name in names) for cell in found.cells]


def test_a_matrix_is_every_combination_in_the_order_written(tmp_path: Path) -> None:
    text = "name: s\nbase: job.yaml\nmatrix: {data.max_length: [256, 512], optim.lr: [1e-5, 2e-5, 3e-5]}\n"
    found = sweep(tmp_path, text)
    assert values(found, "data.max_length", "optim.lr") == [
        (256, 1e-5), (256, 2e-5), (256, 3e-5), (512, 1e-5), (512, 2e-5), (512, 3e-5),
    ]  # fmt: skip
    assert [cell.job.data.max_length for cell in found.cells] == [256] * 3 + [512] * 3
    assert [cell.job.optim.lr for cell in found.cells] == [1e-5, 2e-5, 3e-5] * 2


def test_every_entry_of_cells_goes_with_every_combination(tmp_path: Path) -> None:
    text = (
        "name: s\nbase: job.yaml\nmatrix: {data.max_length: [256, 512]}\n"
        "cells: [{parallel.workers: 1}, {parallel.workers: 2, parallel.sequence_parallel_size: 2}]\n"
    )
    found = sweep(tmp_path, text)
    assert values(found, "parallel.workers", "data.max_length") == [(1, 256), (1, 512), (2, 256), (2, 512)]
    assert [cell.job.parallel.sequence_parallel_size for cell in found.cells] == [1, 1, 2, 2]


def test_several_bases_are_told_apart_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(JOB.replace("512", "64"))
    found = sweep(tmp_path, "name: s\nbase: [job.yaml, other.yaml]\n")
    assert values(found, "job") == [("job",), ("other",)]
    assert [cell.job.data.max_length for cell in found.cells] == [512, 64]


def test_the_job_may_stand_in_the_sweep(tmp_path: Path) -> None:
    found = sweep(tmp_path, yaml.safe_dump({"name": "s", "job": yaml.safe_load(JOB)}))
    assert [cell.job.data.max_length for cell in found.cells] == [512]


def test_a_cell_is_a_job_that_is_measured_and_not_kept(tmp_path: Path) -> None:
    text = "name: s\nbase: job.yaml\nwarmup_steps: 3\nsteps: 7\nstorage: /results\n"
    (cell,) = sweep(tmp_path, text).cells
    assert cell.job.optim.max_steps == 10
    assert cell.job.run.max_failures == 0, "a cell that fails is a row, and is not tried again"
    assert cell.job.metrics.port is None
    assert cell.job.checkpoint.storage == "/results/s/cells"
    assert cell.job.name == cell.name


def test_without_steps_the_job_says_how_many(tmp_path: Path) -> None:
    (cell,) = sweep(tmp_path, "name: s\nbase: job.yaml\n", "optim.max_steps=5").cells
    assert cell.job.optim.max_steps == 5


def test_a_name_says_what_a_cell_is_and_changes_with_what_its_figures_depend_on(tmp_path: Path) -> None:
    text = "name: s\nbase: job.yaml\nmatrix: {data.max_length: [256]}\nwarmup_steps: 2\nsteps: 3\n"
    (cell,) = sweep(tmp_path, text).cells
    assert cell.name.startswith("max_length-256-")
    same = {
        sweep(tmp_path, text).cells[0].name,
        sweep(tmp_path, text + "storage: /elsewhere\n").cells[0].name,
    }
    assert same == {cell.name}
    changed = [
        sweep(tmp_path, text, "optim.lr=1e-3"),
        sweep(tmp_path, text.replace("warmup_steps: 2", "warmup_steps: 1")),
        sweep(tmp_path, text + "memory_limit_gib: 8\n"),
    ]
    assert len({cell.name, *(each.cells[0].name for each in changed)}) == 4


def test_a_long_list_of_fields_makes_a_valid_name(tmp_path: Path) -> None:
    targets = ", ".join(["q_proj"] * 30)
    text = f"name: s\nbase: job.yaml\nmatrix: {{method: [{{type: lora, target_modules: [{targets}]}}]}}\n"
    (cell,) = sweep(tmp_path, text).cells
    assert len(cell.name) <= 63


def test_the_same_cell_written_twice_is_run_once(tmp_path: Path) -> None:
    found = sweep(
        tmp_path, "name: s\nbase: job.yaml\ncells: [{data.max_length: 64}, {data.max_length: 64}]\n"
    )
    assert len(found.cells) == 1


HEAD = "name: s\nbase: job.yaml\n"
BROKEN = {
    "unknown key": (
        HEAD + "stepz: 3\n",
        "sweep.yaml:3: stepz is not a field of a sweep; did you mean steps?",
    ),
    "neither base nor job": ("name: s\n", "sweep.yaml: the sweep has neither base nor job"),
    "base and job": (HEAD + "job: {}\n", "sweep.yaml: the sweep has both base and job"),
    "unknown layout": (HEAD + "layout: html\n", 'sweep.yaml:3: layout="html" is not a valid value'),
    "no values": (HEAD + "matrix: {optim.lr: []}\n", "sweep.yaml:3: matrix.optim.lr has 0 elements"),
    "no list": (
        HEAD + "matrix: {optim.lr: 3}\n",
        "sweep.yaml:3: matrix.optim.lr=3 has the wrong type; it must be a list",
    ),
    "a key twice": (HEAD + "name: t\n", "sweep.yaml:3: duplicate key name (first defined on line 1)"),
    "no such base": ("name: s\nbase: none.yaml\n", "sweep.yaml:2: job file"),
    "base of a wrong type": ("name: s\nbase: 3\n", "sweep.yaml:2: base=3 has the wrong type"),
    "a field in both": (
        HEAD + "matrix: {optim.lr: [1]}\ncells:\n  - {optim.lr: 2}\n",
        "sweep.yaml:5: optim.lr is in cells and in matrix",
    ),
    "an unknown field of the job": (
        HEAD + "matrix:\n  data.max_lenght: [64]\n",
        "sweep.yaml:4: data.max_lenght is not a field of a job; did you mean max_length?",
    ),
    "a value out of range": (
        HEAD + "matrix:\n  data.max_length:\n    - 64\n    - 2\n",
        "sweep.yaml:6: data.max_length=2 is out of range",
    ),
    "cells that break a rule": (
        HEAD + "cells:\n  - {parallel.workers: 3}\n",
        "sweep.yaml:4: optim.global_batch_size=8 is not a multiple",
    ),
    "no way to the field": (
        HEAD + "matrix: {name.first: [a]}\n",
        "sweep.yaml:3: name.first: first is not in name",
    ),
    "too many cells": (
        f"{HEAD}matrix: {{run.seed: {list(range(40))}, optim.lr: {[0.1] * 40}}}\n",
        "sweep.yaml: the sweep has 1600 cells",
    ),
    "no sweep": ("- 1\n", "sweep.yaml: the file is a list, and a sweep is a mapping"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_names_the_place_the_rule_and_the_remedy(kind: str, tmp_path: Path) -> None:
    text, start = BROKEN[kind]
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert start in found[0]


def test_an_error_of_the_base_is_told_once_and_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(JOB + "optim: {lr: -1}\n")
    found = problems(tmp_path, "name: s\nbase: bad.yaml\nmatrix: {data.max_length: [64, 128]}\n")
    assert found == ("bad.yaml:4: optim.lr=-1 is out of range; it must be above 0.0",)


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    text = "name: s\nbase: job.yaml\nmatrix:\n  data.max_length: [1, 64]\n  optim.lr: [0, 1e-5]\n"
    found = problems(tmp_path, text)
    assert [each.split(" is ")[0] for each in found] == [
        "sweep.yaml:4: data.max_length=1",
        "sweep.yaml:5: optim.lr=0",
    ]


def test_overrides_are_set_in_every_cell(tmp_path: Path) -> None:
    text = "name: s\nbase: job.yaml\nmatrix: {data.max_length: [64, 128]}\n"
    assert {cell.job.optim.lr for cell in sweep(tmp_path, text, "optim.lr=0.5").cells} == {0.5}
    assert problems(tmp_path, text, "optim.lr") == (
        "--set optim.lr: not of the form field.name=value; write for example --set optim.lr=1e-5",
    )


def test_a_whole_section_is_set_at_once_and_shown_field_by_field(tmp_path: Path) -> None:
    text = f"{HEAD}cells:\n  - {{method: {{type: lora, rank: 4}}}}\n  - {{method: {{type: full}}}}\n"
    first, second = sweep(tmp_path, text).cells
    assert first.fields == {"method.type": "lora", "method.rank": 4}
    assert (first.job.method.type, first.job.method.rank, second.job.method.type) == ("lora", 4, "full")
    assert first.name.startswith("type-lora-rank-4-")
    assert second.fields == {"method.type": "full"}
