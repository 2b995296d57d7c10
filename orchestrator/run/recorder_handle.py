"""The recorder as other processes see it: a Ray actor whose methods return object references."""

from __future__ import annotations

from typing import Any, Protocol


class RemoteMethod(Protocol):
    """A method of an actor."""

    def remote(self, *arguments: object) -> Any:
        """Call it, and return the `ObjectRef` of its result."""


class RecorderHandle(Protocol):
    """Handle of the `orchestrator.run.recorder.Recorder` actor; every method is described there."""

    begin_attempt: RemoteMethod
    next_attempt: RemoteMethod
    record_step: RemoteMethod
    record_evaluation: RemoteMethod
    record_checkpoint: RemoteMethod
    authorize_publish: RemoteMethod
    report_failure: RemoteMethod
    report_fatal: RemoteMethod
    failures: RemoteMethod
    finish_training: RemoteMethod
    end_attempt: RemoteMethod
    end_run: RemoteMethod
    request_stop: RemoteMethod
    stop_requested: RemoteMethod
    status: RemoteMethod
    checkpoint_seconds: RemoteMethod
    close: RemoteMethod
