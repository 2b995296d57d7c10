"""No command removes or changes a file of the user, in whatever directory it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import job_text, orchestrator

pytestmark = pytest.mark.ray

RUN = "runs/run"
FOLDERS = (
    "runs", "runs/.cache", "runs/.cache/mine.partial", "runs/.cache/a.b.c.partial", RUN, f"{RUN}/export",
    f"{RUN}/checkpoints", f"{RUN}/checkpoints/mine.partial", f"{RUN}/checkpoints/step-00000001",
    f"{RUN}/checkpoints/step-00000003/deep", f"{RUN}/logs", "swap", "swap/mine.swap", "plots", "shelf",
    "model/mine", ".model.partial", "runs/demo", "results/s", "results/s/cells",
)  # fmt: skip


@pytest.fixture
def planted(tmp_path: Path) -> dict[Path, tuple[str, int]]:
    """Put a file that is a month old into every directory that a command may write to."""
    files = [tmp_path / folder / "notes.txt" for folder in FOLDERS]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"mine, in {file.parent.name}")
        for path in (file, file.parent):
            os.utime(path, (time.time() - 30 * 86400,) * 2)
    return {file: (file.read_text(), file.stat().st_mtime_ns) for file in files}


def test_every_planted_file_survives_every_command(
    tmp_path: Path, planted: dict[Path, tuple[str, int]]
) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = orchestrator(*arguments, cwd=tmp_path)
        assert done.code == code, done.err
        actual = {file: (file.read_text(), file.stat().st_mtime_ns) for file in planted if file.exists()}
        assert actual == planted, f"after {' '.join(arguments)}"
        return done.out + done.err

    text = job_text(
        Path("runs"), eval=None, checkpoint__every_steps=1, checkpoint__keep=1, optim__max_steps=3,
        data={"train": [{"path": "builtin/alpaca_sample"}], "max_length": 256},
        parallel={"workers": 1, "zero_stage": 2},
    )  # fmt: skip
    (tmp_path / "job.yaml").write_text(text)
    run("validate", "job.yaml")
    run("render", "job.yaml")
    run("plan", "job.yaml", "--gpus", "1x1xA100-80G-SXM", "--plots", "plots")
    run("pack", "job.yaml")
    assert "exporting to " in run("train", "job.yaml")
    assert [path.parent.name for path in (tmp_path / RUN).glob("checkpoints/*/manifest.json")] == [
        "step-00000003"
    ]
    report = json.loads((tmp_path / RUN / "report.json").read_text())
    assert report["export"] == str(tmp_path / RUN / "export-2")
    assert (tmp_path / RUN / "export-2" / "model.safetensors").is_file()
    run("report", RUN)
    for target in ("shelf", RUN):  # more of them in tests/exports
        run("export", RUN, "--to", target, code=2)
    for _ in range(2):
        exported = json.loads(run("export", RUN, "--to", "exported", "--json").splitlines()[0])
        assert exported["step"] == 3
    run("checkpoint", "verify", RUN)
    run("checkpoint", "convert", RUN, "--to", "shelf", code=2)
    run("checkpoint", "convert", RUN, "--to", "converted")
    storage = f"checkpoint.storage={tmp_path / 'runs'}"
    run("submit", "job.yaml", "--address", "http://127.0.0.1:9", "--set", storage, code=3)
    run("doctor", "--storage", "runs")
    sweep = {
        "name": "s", "job": yaml.safe_load(text), "storage": "results", "warmup_steps": 0, "steps": 1,
        "cells": [{"data.max_length": 128}],
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    run("bench", "sweep.yaml")
    run("report", "results/s")
