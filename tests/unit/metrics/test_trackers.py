"""Trackers receive every step, do not delay training, and their failures do not fail the run."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.metrics import trackers
from orchestrator.metrics.trackers import PACKAGES, Trackers, require_packages

JOB = {"name": "run", "optim": {"lr": 1e-4}}
ROWS = [{"loss": 3.0 - step, "tgs": 100.0, "mfu": None, "skipped": False, "time": 1.7e9} for step in range(3)]


class FakeTracker:
    """Records its calls; may block, and may fail at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.closed, self.unblocked = fails_at, False, threading.Event()
        self.unblocked.set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.unblocked.wait(10)
        if step == self.fails_at:
            raise ConnectionError("gone")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def start_trackers(monkeypatch: pytest.MonkeyPatch, folder: Path, **fakes: Any) -> tuple[Trackers, list[str]]:
    factories = {name: (lambda *_, fake=fake: fake) for name, fake in fakes.items()}
    monkeypatch.setattr(trackers, "_FACTORIES", factories)
    notes: list[str] = []
    return Trackers(tuple(fakes), "run", "project", folder, JOB, notes.append), notes


def test_every_tracker_receives_all_steps_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = FakeTracker(), FakeTracker()
    run_trackers, notes = start_trackers(monkeypatch, tmp_path, wandb=one, mlflow=other)
    for step, row in enumerate(ROWS, start=1):
        run_trackers.log(step, row)
    run_trackers.log(4, {"loss": float("nan")})
    run_trackers.close()
    assert [step for step, _ in one.rows] == [1, 2, 3, 4]
    assert one.rows == other.rows
    assert one.rows[0][1] == {"loss": 3.0, "tgs": 100.0, "time": 1.7e9}
    assert one.rows[3][1] == {}
    assert one.closed
    assert other.closed
    assert notes == []


def test_a_failing_tracker_is_disabled_and_the_other_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, other = FakeTracker(fails_at=2), FakeTracker()
    run_trackers, notes = start_trackers(monkeypatch, tmp_path, wandb=failing, mlflow=other)
    for step, row in enumerate(ROWS, start=1):
        run_trackers.log(step, row)
    run_trackers.close()
    assert [step for step, _ in failing.rows] == [1]
    assert [step for step, _ in other.rows] == [1, 2, 3]
    assert notes == ["tracker wandb is disabled: ConnectionError: gone"]


def test_a_tracker_that_does_not_start_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no key")

    other = FakeTracker()
    monkeypatch.setattr(trackers, "_FACTORIES", {"wandb": fails, "mlflow": lambda *_: other})
    notes: list[str] = []
    run_trackers = Trackers(("wandb", "mlflow"), "run", "project", tmp_path, JOB, notes.append)
    run_trackers.log(1, ROWS[0])
    run_trackers.close()
    assert notes == ["tracker wandb is disabled: OSError: no key"]
    assert len(other.rows) == 1


def test_a_slow_tracker_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MAX_QUEUED", 2)
    slow = FakeTracker()
    slow.unblocked.clear()
    run_trackers, notes = start_trackers(monkeypatch, tmp_path, wandb=slow)
    for step in range(1, 9):
        run_trackers.log(step, ROWS[0])  # would block forever
    assert len(notes) == 1
    assert "2 steps behind" in notes[0]
    slow.unblocked.set()
    run_trackers.close()
    assert 2 <= len(slow.rows) <= 4


def test_missing_packages_are_reported_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_packages(())
    with pytest.raises(SpecError) as caught:
        require_packages(("tensorboard", "wandb"))
    assert len(caught.value.problems) == 2
    assert "metrics.trackers contains wandb" in caught.value.problems[1]


def log_with_real_package(name: str, folder: Path) -> list[str]:
    """Log three steps, resume with a fourth in a second `Trackers`, and return the error messages."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} (extra trackers) is not installed")
    notes: list[str] = []
    for steps in ((1, 2, 3), (4,)):
        run_trackers = Trackers((name,), "run", "project", folder, JOB, notes.append)
        for step in steps:
            run_trackers.log(step, {"loss": 1.0 / step, "time": 1.7e9 + step})
        run_trackers.close()
    return notes


def test_tensorboard_has_the_logged_steps(tmp_path: Path) -> None:
    assert log_with_real_package("tensorboard", tmp_path) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)
    ]


def test_mlflow_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert log_with_real_package("mlflow", tmp_path) == []
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "project"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)
    ]
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.info.status == "FINISHED"


def test_wandb_resumes_the_same_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert log_with_real_package("wandb", tmp_path) == []
    run_id = (tmp_path / "wandb_id").read_text().strip()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(written) == 2, "a run resumed offline has two folders to sync"
    assert all(list(folder.glob("*.wandb")) for folder in written)
