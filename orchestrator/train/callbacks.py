"""What Ray Train's controller tells the recorder: that the workers of an attempt are gone."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from orchestrator.run.recorder_handle import RecorderHandle


class AttemptWatch(UserCallback):  # type: ignore[misc]
    """Has the recorder withdraw an attempt's series as soon as a worker of it has failed.

    The workers cannot say so themselves: one that is killed says nothing, and the others are ended with it.

    Args:
        recorder: The actor that keeps the run's records.
    """

    def __init__(self, recorder: RecorderHandle) -> None:
        self._recorder = recorder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tell the recorder, and wait for nothing: the controller has a group to start again."""
        self._recorder.end_attempt.remote()
