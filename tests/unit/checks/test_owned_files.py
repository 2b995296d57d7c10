"""A run removes only files that it wrote; all other files stay in place."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.bench import report
from orchestrator.bench.runner import run_cells
from orchestrator.bench.sweep import load
from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.checkpoint.manifest import MANIFEST, read_manifest
from orchestrator.checkpoint.retention import Retention
from orchestrator.cli import demo
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.data.token_cache import draft_of
from orchestrator.data.tokenize import _sweep
from orchestrator.engine import nvme_dir
from orchestrator.errors import SpecError
from orchestrator.export.export import fp32_weights
from orchestrator.run.run_dir import open_run, record_job
from tests.support.checkpoints import write_checkpoint

TENSORS = "tensors-00000.safetensors"


def plant(*folders: Path) -> dict[Path, str]:
    """Write a file into each folder, and return the texts by path."""
    planted = {folder / "notes.txt": f"mine, in {folder.name}" for folder in folders}
    for file, text in planted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return planted


def published(folder: Path, step: int, content: float = 0.0) -> Path:
    return write_checkpoint(folder, step, {"a": torch.full((3,), content)})


def content_of(saved: Path) -> float:
    return fp32_weights(saved)["a"].contiguous()[0].item()


def assert_unchanged(planted: dict[Path, str]) -> None:
    assert {file: file.read_text() for file in planted} == planted


def test_retention_keeps_files_of_the_user_in_checkpoints(tmp_path: Path) -> None:
    old = [published(tmp_path, step) for step in (1, 2, 3, 4)]
    pinned = shutil.copytree(old[0], tmp_path / "step-00000001-best")
    mine = (tmp_path / "mine.partial", tmp_path / "step-00000009", tmp_path / "step-x.old.partial")
    planted = plant(tmp_path, old[0], old[1] / "deep", old[3], *mine)
    for _ in range(2):
        checkpoint_dir.clean(tmp_path, Retention(2))
        assert_unchanged(planted)
        assert checkpoint_dir.published(tmp_path) == old[2:]
        assert content_of(pinned) == 0.0
    assert [path.name for path in old[0].iterdir()] == ["notes.txt"]
    assert [path.name for path in old[1].rglob("*.*")] == ["notes.txt"]


def test_retention_removes_whole_checkpoints_and_our_drafts(tmp_path: Path) -> None:
    old = [published(tmp_path, step) for step in (1, 2, 3)]
    for name in ("step-00000004.attempt-1.partial", "step-00000001.old.partial"):
        (tmp_path / name).mkdir(parents=True)
    checkpoint_dir.clean(tmp_path, Retention(1))
    assert list(tmp_path.iterdir()) == [old[2]]


def test_an_interrupted_removal_is_finished(tmp_path: Path) -> None:
    first, second = published(tmp_path, 1), published(tmp_path, 2)
    (first / MANIFEST).rename(first / "manifest.retired.json")
    (first / TENSORS).unlink()
    assert checkpoint_dir.published(tmp_path) == [second]
    checkpoint_dir.clean(tmp_path, Retention(1))
    assert list(tmp_path.iterdir()) == [second]


@pytest.mark.parametrize("with_manifest", [True, False])
def test_publishing_a_step_again_keeps_files_of_the_user(tmp_path: Path, with_manifest: bool) -> None:
    final = published(tmp_path, 1, 1.0)
    if not with_manifest:
        shutil.rmtree(final)
    planted = plant(final, final / "deep")
    draft = published(tmp_path / "draft", 1, 2.0)
    manifest = read_manifest(draft)
    checkpointer._publish(draft, final, manifest)
    assert_unchanged(planted)
    assert content_of(final) == 2.0
    assert checkpoint_dir.published(tmp_path) == [final]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", final.name]


@pytest.mark.parametrize("new_is_there", [True, False])
def test_an_interrupted_replacement_is_finished(tmp_path: Path, new_is_there: bool) -> None:
    replaced = published(tmp_path, 1, 1.0).rename(tmp_path / "step-00000001.replaced.partial")
    planted = plant(replaced)
    final = published(tmp_path, 1, 2.0) if new_is_there else tmp_path / "step-00000001"
    checkpoint_dir.clean(tmp_path, Retention(1))
    assert content_of(final) == (2.0 if new_is_there else 1.0)
    assert (final / "notes.txt").read_text() == planted[replaced / "notes.txt"]
    assert list(tmp_path.iterdir()) == [final]


def test_the_cache_and_the_folder_of_swaps_lose_only_drafts(tmp_path: Path) -> None:
    ours = [draft_of(tmp_path / f"{'a' * 24}"), draft_of(tmp_path / f"packed-{'b' * 24}")]
    mine = [tmp_path / name for name in ("mine.partial", "a.b.c.partial", "a.1.2.partial", "x.swap")]
    planted = plant(*ours, *mine)
    for folder in (*ours, *mine):
        os.utime(folder, (time.time() - 1e6,) * 2)
    _sweep(tmp_path)
    swap = tmp_path / "run.rank-0.0123abcd.swap"
    swap.mkdir()
    with nvme_dir._swap_dir(tmp_path, "run.rank-0"):
        pass
    assert not any(folder.exists() for folder in (*ours, swap))
    assert_unchanged({file: text for file, text in planted.items() if file.parent in mine})


def job(storage: Path) -> JobSpec:
    document = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}]},
        "checkpoint": {"storage": str(storage)},
    }
    return JobSpec.model_validate_json(json.dumps(document))


@pytest.mark.parametrize("name", ["job.yaml", "deepspeed.json", "report.json", "plan.json"])
def test_a_run_overwrites_no_file_that_none_wrote(name: str, tmp_path: Path) -> None:
    run_dir = open_run(job(tmp_path))
    (run_dir / name).write_text("# my own\n" + loader.dump(job(tmp_path)))
    with pytest.raises(SpecError, match=f"contains a {name} that no run wrote"):
        open_run(job(tmp_path))
    assert (run_dir / name).read_text().startswith("# my own\n")


def test_a_run_starts_beside_other_files_and_again_after_a_failed_start(tmp_path: Path) -> None:
    planted = plant(tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "export")
    (tmp_path / "run" / ".writable").write_text("mine")
    run_dir = open_run(job(tmp_path))
    for name, key in (("data.json", "train"), ("base.json", "config"), ("plan.json", "machines")):
        (run_dir / name).write_text(json.dumps({key: "of a start that failed"}))
    open_run(job(tmp_path))
    record_job(run_dir, job(tmp_path))
    (run_dir / "deepspeed.json").write_text("{}")
    open_run(job(tmp_path))
    assert_unchanged({**planted, run_dir / ".writable": "mine"})


def test_a_sweep_overwrites_no_table_that_none_wrote(tmp_path: Path) -> None:
    from orchestrator.bench import plots

    sweep: dict[str, Any] = {
        "name": "s",
        "job": {"name": "j", "model": {"path": "builtin/tiny-llama"}, "data": {"train": [{"path": "x"}]}},
        "cells": [{"data.max_length": 256}],
        "storage": str(tmp_path / "results"),
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    (tmp_path / "results" / "s").mkdir(parents=True)
    (tmp_path / "results" / "s" / "table.csv").write_text("mine")
    with pytest.raises(SpecError, match=r"holds a table\.csv that no sweep wrote"):
        run_cells(load(tmp_path / "sweep.yaml", []), None, lambda _: None)
    assert os.listdir(tmp_path / "results" / "s") == ["table.csv"]
    source = Path(plots.__file__).read_text()
    assert all(f'"{name}"' in source for name in report.PLOTS)


def test_the_demonstration_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    planted = plant(tmp_path / "demo", tmp_path / "demo-2")
    assert demo._new_folder(tmp_path) == tmp_path / "demo-3"
    assert_unchanged(planted)
