"""The commands of `orchestrator checkpoint`."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from orchestrator.checkpoint.inspection import find
from orchestrator.cli.checkpoint_commands import app
from orchestrator.errors import SpecError
from tests.support.checkpoints import flip_a_bit, write_checkpoint

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run" / "checkpoints", 3, STATE)
    return write_checkpoint(tmp_path / "run" / "checkpoints", 12, STATE)


def test_a_run_means_its_newest_checkpoint(saved: Path, tmp_path: Path) -> None:
    for path in (saved, saved.parent, tmp_path / "run"):
        assert find(path) == saved
    with pytest.raises(SpecError, match="is not a checkpoint and has none; name a run directory"):
        find(tmp_path)


def test_show(saved: Path) -> None:
    found = json.loads(run("show", saved, "--json"))
    assert (found["step"], found["optimizer"], found["files"]) == (12, "adamw", 1)
    assert found["sections"] == {"model": {"tensors": 2, "elements": 17, "bytes": 12 * 4 + 5 * 2}}
    assert found["tensors"]["model.a.weight"] == {"dtype": "F32", "shape": [3, 4]}
    text = run("show", saved)
    assert text.startswith(f"step 12, attempt 1: {saved}\n")
    assert text.splitlines()[-1].split() == ["model", "2", "17", "0.0"]


def test_verify(saved: Path) -> None:
    assert run("verify", saved) == f"{saved} is whole\n"
    flip_a_bit(saved, "model.b")
    answer = json.loads(run("verify", saved, "--json", code=4).splitlines()[0])
    assert not answer["whole"]
    assert "(model.a.weight, model.b)" in answer["problems"][0]  # both are in the damaged block


def test_diff(saved: Path, tmp_path: Path) -> None:
    same = saved.with_name("step-00000003")
    assert run("diff", saved, same) == "all 2 tensors are equal to the bit\n"
    changed = {"a.weight": STATE["a.weight"] * 1.5, "c": torch.ones(1)}
    other = write_checkpoint(tmp_path / "other", 1, changed)
    answer = json.loads(run("diff", saved, other, "--json", code=1))
    assert answer["tensors"] == 3
    assert answer["differing"] == [
        {"name": "model.a.weight", "largest": 5.5, "relative": 0.5},
        {"name": "model.b", "largest": None, "relative": None},
        {"name": "model.c", "largest": None, "relative": None},
    ]
    text = run("diff", saved, other, code=1)
    assert text.splitlines()[0] == "3 of 3 tensors differ"
    assert "model.a.weight: relative L2 5.00e-01, largest 5.50e+00" in text


def test_convert_writes_whole_tensors_and_overwrites_nothing(saved: Path, tmp_path: Path) -> None:
    to = tmp_path / "new" / "tensors"
    (file,) = run("convert", saved, "--to", to).splitlines()
    found = load_file(file)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"model.{name}": tensor.tolist() for name, tensor in STATE.items()
    }
    assert stat.S_IMODE(Path(file).stat().st_mode) == stat.S_IMODE(to.stat().st_mode) & 0o666
    assert [path.name for path in to.parent.iterdir()] == ["tensors"]
    run("convert", saved, "--to", to, code=2)
    assert [path.name for path in to.iterdir()] == ["model-00000.safetensors"]


def test_a_damaged_checkpoint_is_not_converted(saved: Path, tmp_path: Path) -> None:
    flip_a_bit(saved, "model.a.weight")
    run("convert", saved, "--to", tmp_path / "tensors", code=4)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
