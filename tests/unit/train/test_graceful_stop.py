"""Messages of a run that receives a stop request."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import TrainingError
from orchestrator.run.recorder import Status
from orchestrator.train import graceful_stop


class Recorder:
    """A fake recorder actor that returns the given statuses in order."""

    def __init__(self, *answers: Status, running: bool = True) -> None:
        self.answers, self.running, self.ended_as = list(answers), running, ""

    def __getattr__(self, name: str) -> Any:
        recorder = self

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                if name == "request_stop":
                    return recorder.running
                if name == "end_run":
                    recorder.ended_as = arguments[0]
                    return None
                return recorder.answers.pop(0) if len(recorder.answers) > 1 else recorder.answers[0]

        return Method


@pytest.fixture
def workers() -> Any:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    yield thread
    over.set()


def stop(
    monkeypatch: Any, recorder: Recorder, workers: Any, folder: Path, saved: int = 0, grace: float = 60.0
) -> str:
    monkeypatch.setattr(graceful_stop.ray, "get", lambda value, timeout=None: value)
    if saved:
        (folder / f"step-{saved:08d}").mkdir(parents=True)
        (folder / f"step-{saved:08d}" / "manifest.json").write_text("{}")
    return str(graceful_stop.stop_run(recorder, workers, folder, grace, lambda status: None))


def at(step: int, running: bool = True, **more: Any) -> Status:
    return Status(attempt=1, step=step, steps=9, is_running=running, **more)


AGAIN = "run the same command again to resume"


def test_workers_save_the_step_that_they_are_at(monkeypatch: Any, workers: Any, tmp_path: Path) -> None:
    recorder = Recorder(at(3), at(4), at(4, running=False))
    assert (
        stop(monkeypatch, recorder, workers, tmp_path, saved=4)
        == f"at step 4 of 9, checkpoint saved; {AGAIN}"
    )
    assert recorder.ended_as == "stopped"


def test_no_step_is_waited_for_longer_than_there_is_time(
    monkeypatch: Any, workers: Any, tmp_path: Path
) -> None:
    recorder = Recorder(at(4))
    assert stop(monkeypatch, recorder, workers, tmp_path, saved=2, grace=0.0) == (
        "at step 4 of 9, the last checkpoint is of step 2: the workers did not end within "
        f"run.stop_grace_seconds=0; {AGAIN} from there"
    )
    assert recorder.ended_as == "stopped", "which is not a failure"


def test_before_workers_have_begun_nothing_is_waited_for(
    monkeypatch: Any, workers: Any, tmp_path: Path
) -> None:
    recorder = Recorder(Status(), running=False)
    assert stop(monkeypatch, recorder, workers, tmp_path) == (
        f"before the first step, there is no checkpoint yet; {AGAIN}"
    )
    assert recorder.ended_as == ""


def test_after_the_last_step_only_the_export_is_missing(
    monkeypatch: Any, workers: Any, tmp_path: Path
) -> None:
    recorder = Recorder(at(9, running=False))
    assert stop(monkeypatch, recorder, workers, tmp_path, saved=9) == (
        f"at step 9 of 9, checkpoint saved; {AGAIN} with the export"
    )


def test_a_checkpoint_that_cannot_be_written_is_told_of(
    monkeypatch: Any, workers: Any, tmp_path: Path
) -> None:
    fatal = TrainingError("the checkpoint of step 4 cannot be written")
    recorder = Recorder(at(4, running=False, fatal=fatal))
    assert stop(monkeypatch, recorder, workers, tmp_path, saved=2) == (
        "at step 4 of 9, the last checkpoint is of step 2: the checkpoint of step 4 cannot be written; "
        f"{AGAIN} from there"
    )
    assert recorder.ended_as == ""
