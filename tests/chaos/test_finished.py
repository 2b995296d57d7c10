"""Starting a finished run again: its report, more steps with another layout, or a refusal of other data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import job_text, losses, orchestrator

pytestmark = pytest.mark.ray


def _job(folder: Path) -> None:
    folder.mkdir()
    rows = [{"instruction": f"Say {number}.", "output": f"{number}"} for number in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.yaml").write_text(
        job_text(
            folder / "runs",
            data={"train": [{"path": "rows.jsonl"}], "max_length": 256},
            parallel={"workers": 1, "zero_stage": 2},
            optim={"lr": 1e-3, "global_batch_size": 4, "lr_scheduler": "constant", "max_steps": 4},
            eval=None,
        )
    )


def test_a_finished_run_prints_its_report_or_resumes_or_refuses(tmp_path: Path) -> None:
    straight, stages = tmp_path / "straight", tmp_path / "stages"
    for folder in (straight, stages):
        _job(folder)
    assert orchestrator("train", "job.yaml", cwd=straight).code == 0

    first = orchestrator("train", "job.yaml", "--json", "--set", "optim.max_steps=2", cwd=stages)
    assert first.code == 0, first.err
    run = stages / "runs" / "run"
    before = losses(run)
    again = orchestrator("train", "job.yaml", "--json", "--set", "optim.max_steps=2", cwd=stages, timeout=60)
    assert (again.code, json.loads(again.out)) == (0, json.loads(first.out))
    assert "already finished" in again.err
    assert "nothing was trained" in again.err
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 1

    layout = ("--set", "parallel.workers=2", "--set", "parallel.zero_stage=3")
    more = orchestrator("train", "job.yaml", "--json", *layout, cwd=stages)
    assert more.code == 0, more.err
    assert "the run resumes from step 2 and trains to step 4 instead of 2" in more.err
    assert json.loads(more.out)["steps"] == 4
    assert json.loads(more.out)["restarts"] == 0
    assert json.loads(more.out)["world_size"] == 2
    assert 0 <= json.loads(more.out)["padding_fraction"] < 1, "with one worker in steps 1 and 2"
    assert {step: loss for step, loss in losses(run).items() if step <= 2} == before
    assert losses(run) == pytest.approx(losses(straight / "runs" / "run"), rel=1e-5)

    (stages / "rows.jsonl").write_text((stages / "rows.jsonl").read_text().replace("Say", "Shout"))
    other = orchestrator("train", "job.yaml", cwd=stages, timeout=60)
    assert other.code == 2
    assert "data.train" in other.err
    assert "changed since run" in other.err
