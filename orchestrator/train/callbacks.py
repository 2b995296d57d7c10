"""Ray Train callbacks: the controller reports failed attempts to the recorder."""

from __future__ import annotations

from ray.train import UserCallback

from orchestrator.run.recorder_handle import RecorderHandle


class AttemptWatch(UserCallback):  # type: ignore[misc]
    """Ends an attempt in the recorder, and so removes its metrics, as soon as one of its workers fails.

    The workers cannot report this: a killed worker sends nothing, and Ray Train ends the others with it.

    Args:
        recorder: The actor that keeps the run's records.
    """

    def __init__(self, recorder: RecorderHandle) -> None:
        self._recorder = recorder

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Report the end of the attempt, without waiting for the recorder: a restart must not be delayed."""
        self._recorder.end_attempt.remote()
