"""Graceful stop of a run: the workers save a checkpoint within the grace period."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import ray

from orchestrator import shutdown
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.run.recorder import Status
from orchestrator.run.recorder_handle import RecorderHandle

_POLL_SECONDS = 0.1
_TIMEOUT_SECONDS = 5.0
AGAIN = "run the same command again to resume"


def stop_run(
    recorder: RecorderHandle,
    workers: threading.Thread,
    checkpoints: Path,
    grace_seconds: float,
    on_progress: Callable[[Status], None],
) -> shutdown.Stopped:
    """Ask the workers to save and end, wait for the grace period, and return the exception to raise.

    Args:
        recorder: The actor that keeps the run's records.
        workers: The thread that runs the worker group.
        checkpoints: The checkpoints directory of the run.
        grace_seconds: Grace period, counted from the signal.
        on_progress: Called with the status while waiting.
    """
    status = Status()
    try:
        was_running = ray.get(recorder.request_stop.remote(), timeout=_TIMEOUT_SECONDS)
        while True:
            status = ray.get(recorder.status.remote(), timeout=_TIMEOUT_SECONDS)
            on_progress(status)
            if not status.is_running or not workers.is_alive() or shutdown.seconds_since() >= grace_seconds:
                break
            workers.join(_POLL_SECONDS)
        if was_running and status.fatal is None:
            ray.get(recorder.end_run.remote("stopped"), timeout=_TIMEOUT_SECONDS)
    except Exception as error:  # Ray's processes may have received the signal too
        return shutdown.Stopped(_outcome(status, checkpoints, f"Ray exited first ({type(error).__name__})"))
    if status.fatal is not None:
        return shutdown.Stopped(_outcome(status, checkpoints, "; ".join(status.fatal.problems)))
    late = f"the workers did not end within run.stop_grace_seconds={grace_seconds:g}"
    return shutdown.Stopped(
        _outcome(status, checkpoints, late if workers.is_alive() and status.is_running else "")
    )


def _outcome(status: Status, checkpoints: Path, reason: str) -> str:
    """Return a message with the last step and the last checkpoint.

    Args:
        status: The last known status.
        checkpoints: The checkpoints directory of the run.
        reason: Why the last step was not saved; empty if it was.
    """
    saved = checkpoint_dir.published(checkpoints)
    newest = checkpoint_dir.step_of(saved[-1]) if saved else 0
    if not status.steps:  # no worker has begun
        kept = f"the last checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
        return f"before the first step, {kept}; {AGAIN}"
    where = f"at step {status.step} of {status.steps}"
    if newest and newest >= status.step:
        rest = " with the export" if newest == status.steps else ""
        return f"{where}, checkpoint saved; {AGAIN}{rest}"
    kept = f"the last checkpoint is of step {newest}" if newest else "there is no checkpoint"
    return f"{where}, {kept}{f': {reason}' if reason else ''}; {AGAIN} from there"
