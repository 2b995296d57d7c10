"""Stopping a run while its workers train: they save the step that they are at, if time allows."""

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
_SECONDS_TO_ANSWER = 5.0
AGAIN = "run the same command again and it goes on"


def stop_run(
    recorder: RecorderHandle,
    workers: threading.Thread,
    checkpoints: Path,
    grace_seconds: float,
    watch: Callable[[Status], None],
) -> shutdown.Stopped:
    """Have the workers save and end, wait for them while there is time, and return what to raise.

    Args:
        recorder: The actor that keeps the run's records.
        workers: The thread that ends when the worker group has ended.
        checkpoints: Folder of the run's checkpoints.
        grace_seconds: How long after the signal there is time.
        watch: Shown the status meanwhile.
    """
    status = Status()
    try:
        was_running = ray.get(recorder.request_stop.remote(), timeout=_SECONDS_TO_ANSWER)
        while True:
            status = ray.get(recorder.status.remote(), timeout=_SECONDS_TO_ANSWER)
            watch(status)
            if not status.is_running or not workers.is_alive() or shutdown.seconds_since() >= grace_seconds:
                break
            workers.join(_POLL_SECONDS)
        if was_running and status.fatal is None:
            ray.get(recorder.end_run.remote("stopped"), timeout=_SECONDS_TO_ANSWER)
    except Exception as error:  # whoever sent the signal may have sent it to Ray's processes as well
        return shutdown.Stopped(_outcome(status, checkpoints, f"Ray ended first ({type(error).__name__})"))
    if status.fatal is not None:
        return shutdown.Stopped(_outcome(status, checkpoints, "; ".join(status.fatal.problems)))
    late = f"the workers did not end within run.stop_grace_seconds={grace_seconds:g}"
    return shutdown.Stopped(
        _outcome(status, checkpoints, late if workers.is_alive() and status.is_running else "")
    )


def _outcome(status: Status, checkpoints: Path, reason: str) -> str:
    """Return in a sentence where the run stands.

    Args:
        status: The last that is known of it.
        checkpoints: Folder of its checkpoints.
        reason: Why the last step was not saved, if it was not.
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
