"""SIGTERM and SIGHUP in every phase of a run: one message, exit code 143, at most one step lost.

`python -m tests.chaos.sigterm --times 20` tests more moments, at random.
"""

from __future__ import annotations

import json
import random
import signal
import time
import uuid
from pathlib import Path

import pytest

from tests.chaos.sigterm import begin, interrupt
from tests.conftest import ROOT, Observed, job_text, losses, orchestrator, step_rows, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timed]
_dice = random.Random(14)
SLOW_STEPS = {"PYTHONPATH": f"{ROOT / 'tests' / 'chaos' / 'faults'}:{ROOT}", "STEP_SECONDS": "0.5"}


def test_a_stopped_run_saves_its_step_and_resumes(undisturbed_run: Observed, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs"))
    run = tmp_path / "runs" / "run"
    moments = [
        (lambda: True, signal.SIGTERM, "nothing"),  # while Python imports
        (lambda: (run / "logs" / "driver.log").exists(), signal.SIGHUP, "from the last checkpoint"),
        (lambda: len(step_rows(run)) >= 2, signal.SIGTERM, "checkpoint saved; run the same command again"),
    ]
    for reached, number, words in moments:
        marker = f"TEST_MARKER={uuid.uuid4().hex}"
        process = begin("train", "job.yaml", cwd=tmp_path, marker=marker, **SLOW_STEPS)
        wait_until(reached, 200, "the next phase")
        time.sleep(_dice.uniform(0.0, 0.3))
        answer = interrupt(process, marker, number)
        assert not answer.problems, answer
        assert words in answer.said or words == "nothing", answer
    stopped_at = len(step_rows(run))
    assert stopped_at < 12
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]
    assert json.loads((run / "attempts.jsonl").read_text())["ended"] == "stopped"
    assert not (run / "owner.json").exists(), "the run lock is released"

    done = orchestrator("train", "job.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["restarts"], report["steps_lost"]) == (0, 0)
    assert len(step_rows(run)) == 12, "no step was done twice"
    assert losses(run) == pytest.approx(losses(undisturbed_run.folder), rel=1e-6)


@pytest.mark.parametrize("command", ["pack", "export", "validate", "plan"])
def test_other_commands_end_with_one_message(command: str, tmp_path: Path, undisturbed_run: Observed) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs"))
    arguments = {
        "pack": ["job.yaml", "--json"],
        "export": [str(undisturbed_run.folder), "--to", str(tmp_path / "model")],
        "validate": ["job.yaml"] * 1000,  # one file is validated before the signal arrives
        "plan": ["job.yaml", "--gpus", "2x8xA100-80G-SXM"],
    }[command]
    marker = f"TEST_MARKER={uuid.uuid4().hex}"
    process = begin(command, *arguments, cwd=tmp_path, marker=marker)
    answer = interrupt(process, marker)
    assert not answer.problems, answer
    assert not (tmp_path / "model").exists()
