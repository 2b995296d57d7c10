"""The recorder as other processes see it: a Ray actor whose methods return object references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from ray import ObjectRef

    from orchestrator.run.failures import Failure
    from orchestrator.run.recorder import Status

_T = TypeVar("_T")


class RemoteMethod(Protocol[_T]):
    """A method of an actor that returns a value of type `_T`."""

    def remote(self, *arguments: object) -> ObjectRef[_T]:
        """Call it, and return the reference of its result."""


class RecorderHandle(Protocol):
    """Handle of the `orchestrator.run.recorder.Recorder` actor; every method is described there."""

    begin_attempt: RemoteMethod[int]
    next_attempt: RemoteMethod[int]
    record_step: RemoteMethod[None]
    record_evaluation: RemoteMethod[None]
    record_checkpoint: RemoteMethod[None]
    authorize_publish: RemoteMethod[None]
    report_failure: RemoteMethod[None]
    report_fatal: RemoteMethod[None]
    failures: RemoteMethod[list[Failure]]
    finish_training: RemoteMethod[None]
    end_attempt: RemoteMethod[None]
    end_run: RemoteMethod[None]
    request_stop: RemoteMethod[bool]
    stop_requested: RemoteMethod[bool]
    status: RemoteMethod[Status]
    checkpoint_seconds: RemoteMethod[float]
    close: RemoteMethod[None]
