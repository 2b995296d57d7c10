"""Trackers get every step, hold up nobody, and end nothing."""

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


class Kept:
    """Keeps what it is given; may wait, and may fail at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.closed, self.may_go_on = fails_at, False, threading.Event()
        self.may_go_on.set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.may_go_on.wait(10)
        if step == self.fails_at:
            raise ConnectionError("gone")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def started(monkeypatch: pytest.MonkeyPatch, folder: Path, **given: Any) -> tuple[Trackers, list[str]]:
    starts = {name: (lambda *_, kept=kept: kept) for name, kept in given.items()}
    monkeypatch.setattr(trackers, "_STARTS", starts)
    said: list[str] = []
    return Trackers(tuple(given), "run", "project", folder, JOB, said.append), said


def test_numbers_reach_every_tracker_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Kept(), Kept()
    found, said = started(monkeypatch, tmp_path, wandb=one, mlflow=other)
    for step, row in enumerate(ROWS, start=1):
        found.log(step, row)
    found.log(4, {"loss": float("nan")})
    found.close()
    assert [step for step, _ in one.rows] == [1, 2, 3, 4]
    assert one.rows == other.rows
    assert one.rows[0][1] == {"loss": 3.0, "tgs": 100.0, "time": 1.7e9}
    assert one.rows[3][1] == {}
    assert one.closed
    assert other.closed
    assert said == []


def test_one_that_fails_is_left_out_and_the_other_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, other = Kept(fails_at=2), Kept()
    found, said = started(monkeypatch, tmp_path, wandb=failing, mlflow=other)
    for step, row in enumerate(ROWS, start=1):
        found.log(step, row)
    found.close()
    assert [step for step, _ in failing.rows] == [1]
    assert [step for step, _ in other.rows] == [1, 2, 3]
    assert said == ["wandb is left out from here on: ConnectionError: gone"]


def test_one_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no key")

    other = Kept()
    monkeypatch.setattr(trackers, "_STARTS", {"wandb": fails, "mlflow": lambda *_: other})
    said: list[str] = []
    found = Trackers(("wandb", "mlflow"), "run", "project", tmp_path, JOB, said.append)
    found.log(1, ROWS[0])
    found.close()
    assert said == ["wandb is left out from here on: OSError: no key"]
    assert len(other.rows) == 1


def test_a_slow_one_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 2)
    slow = Kept()
    slow.may_go_on.clear()
    found, said = started(monkeypatch, tmp_path, wandb=slow)
    for step in range(1, 9):
        found.log(step, ROWS[0])  # would wait for ever
    assert len(said) == 1
    assert "2 steps behind" in said[0]
    slow.may_go_on.set()
    found.close()
    assert 2 <= len(slow.rows) <= 4


def test_packages_are_asked_for_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_packages(())
    with pytest.raises(SpecError) as caught:
        require_packages(("tensorboard", "wandb"))
    assert len(caught.value.problems) == 2
    assert "metrics.trackers has wandb" in caught.value.problems[1]


def real(name: str, folder: Path) -> list[str]:
    """Write three steps, go on with a fourth as a later driver would, and return what went wrong."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} (extra trackers) is not installed")
    said: list[str] = []
    for steps in ((1, 2, 3), (4,)):
        found = Trackers((name,), "run", "project", folder, JOB, said.append)
        for step in steps:
            found.log(step, {"loss": 1.0 / step, "time": 1.7e9 + step})
        found.close()
    return said


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    assert real("tensorboard", tmp_path) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)
    ]


def test_mlflow_reads_it_back_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert real("mlflow", tmp_path) == []
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "project"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)
    ]
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.info.status == "FINISHED"


def test_wandb_writes_offline_and_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert real("wandb", tmp_path) == []
    identity = (tmp_path / "wandb_id").read_text().strip()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(written) == 2, "a run that goes on offline is synchronised from two folders"
    assert all(list(folder.glob("*.wandb")) for folder in written)
