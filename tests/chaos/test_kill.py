"""Kill any process at any moment: the run resumes with the same loss curve."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
import uuid
from pathlib import Path

import pytest

from tests.conftest import (
    Observed,
    finish,
    job_text,
    losses,
    orchestrator,
    processes_of,
    start,
    step_rows,
    wait_until,
)

pytestmark = pytest.mark.ray


def _job(folder: Path) -> Path:
    (folder / "job.yaml").write_text(job_text(folder / "runs", checkpoint__every_steps=4))
    return folder / "runs" / "run"


def _of_ours(marker: str) -> list[int]:
    """Return the processes of a command, without two of Ray's agents.

    When a raylet is killed, its agents try for 60 s to reach the GCS, which was killed with it.
    """
    agents = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
    return [pid for pid in processes_of(marker) if not _command(pid).startswith(agents)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def _assert_same_curve(run: Path, undisturbed: Observed) -> None:
    expected = losses(undisturbed.folder)
    assert sorted(losses(run)) == list(range(1, 13))
    assert losses(run) == pytest.approx(expected, rel=1e-6)


def test_a_killed_recorder_and_worker_are_restarted(undisturbed_run: Observed, tmp_path: Path) -> None:
    run, marker = _job(tmp_path), uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(
        "train", "job.yaml", "--json", "--set", f"metrics.port={port}", cwd=tmp_path, TEST_MARKER=marker
    )
    wait_until(lambda: len(step_rows(run)) >= 2, 200, "two steps done")
    (recorder,) = [
        pid for pid in processes_of(f"TEST_MARKER={marker}") if _command(pid).startswith(b"ray::Recorder")
    ]
    os.kill(recorder, signal.SIGKILL)
    wait_until(lambda: len(step_rows(run)) >= 6, 200, "six steps done")
    victim = json.loads((run / "workers.json").read_text())[1]
    wait_until(lambda: "orchestrator_tgs{" in _metrics(port), 30, "rates are shown")
    os.kill(victim["pid"], signal.SIGKILL)
    wait_until(lambda: "orchestrator_tgs{" not in _metrics(port), 60, "rates withdrawn with their workers")
    left = _metrics(port)
    assert 'orchestrator_world_size{attempt="1",run="run"} 2.0' in left, "before the next attempt begins"
    done = finish(process)

    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["restarts"] == 1
    before = [int(row["step"]) for row in step_rows(run) if row["attempt"] == 1]
    after = [int(row["step"]) for row in step_rows(run) if row["attempt"] == 2]
    assert after[0] % 4 == 1, "it resumes right after a checkpoint"
    assert report["steps_lost"] == before[-1] - after[0] + 1
    assert {row["attempt"] for row in step_rows(run)} == {1, 2}
    assert json.loads((run / "workers.json").read_text())[0]["attempt"] == 2
    assert len(step_rows(run)) == 12 + report["steps_lost"], "no step was written twice"
    _assert_same_curve(run, undisturbed_run)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000012"], "the newest two"


def test_ctrl_c_and_a_killed_driver_lose_nothing(undisturbed_run: Observed, tmp_path: Path) -> None:
    run, marker = _job(tmp_path), f"TEST_MARKER={uuid.uuid4().hex}"
    name, _, value = marker.partition("=")

    process = start("train", "job.yaml", cwd=tmp_path, **{name: value})
    wait_until(lambda: len(step_rows(run)) >= 5, 200, "five steps done")
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=60)
    assert done.code == 130
    assert done.err.strip().splitlines()[-1].startswith("interrupted:")
    assert "Traceback" not in done.err
    wait_until(lambda: not processes_of(marker), 30, "all processes of the interrupted run gone")
    stopped_at = len(losses(run))

    process = start("train", "job.yaml", cwd=tmp_path, **{name: value})
    wait_until(lambda: len(losses(run)) >= max(9, stopped_at + 1), 200, "some more steps done")
    process.kill()
    finish(process, timeout=60)
    wait_until(lambda: not _of_ours(marker), 30, "all processes of the killed run gone")

    done = orchestrator("train", "job.yaml", "--json", cwd=tmp_path, **{name: value})
    assert done.code == 0, done.err
    assert json.loads(done.out)["restarts"] == 2
    _assert_same_curve(run, undisturbed_run)
    wait_until(lambda: not processes_of(marker), 90, "no process left behind")

    again = orchestrator("train", "job.yaml", "--json", cwd=tmp_path)
    assert again.code == 0
    assert json.loads(again.out) == json.loads(done.out), "a finished run is shown, not trained again"
