"""Failures of the workers: which rank's exception is the root cause, and whether a retry can help.

When a rank fails, the others usually report only a lost connection. An exception that occurs twice at the
same step is deterministic and will occur a third time, whereas a killed process or a lost node is worth a
retry.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import MemoryExhaustedError, OrchestratorError, TrainingError
from orchestrator.run.run_log import redacted

_TAIL_LINES = 3
_MAX_MESSAGE_CHARS = 300
# Addresses and numbers differ between attempts at the same failure.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")
# Messages of gloo, NCCL, sockets and Ray when the process at the other end is dead or late.
_LOST_PEER = re.compile(
    r"connection (was |is |has been )?(closed|reset|refused|aborted|lost)|broken pipe|remote process exited"
    r"|remote peer|socket (timeout|closed)|timed? ?out|no route to host|ncclRemoteError|ncclSystemError"
    r"|unhandled system error|heartbeat",
    re.IGNORECASE,
)
_LOST_PEER_TYPES = frozenset(
    {"DistNetworkError", "DistStoreError", "RayActorError", "ActorDiedError", "ActorUnavailableError"}
)
# Messages of Ray when its memory monitor kills a task, and an actor.
_KILLED_FOR_MEMORY = re.compile(r"running low on memory|address the out of memory issue")


@dataclass(frozen=True)
class Failure:
    """An exception that a rank raised.

    Attributes:
        group: Id of the worker group; every attempt has a new group.
        rank: The rank that raised it.
        step: Completed steps, or None before the first.
        error_type: Class name of the exception.
        message: Its message, on one line.
        location: File and line that raised it.
        tail: The last lines of its traceback.
        log: The file with the whole traceback.
    """

    group: str
    rank: int
    step: int | None
    error_type: str
    message: str
    location: str
    tail: tuple[str, ...]
    log: str

    @classmethod
    def from_exception(
        cls, error: BaseException, group: str, rank: int, step: int | None, log: str
    ) -> Failure:
        """Return the failure for a caught exception; arguments as the attributes."""
        frames = traceback.extract_tb(error.__traceback__)
        location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        lines = [line for text in traceback.format_exception(error) for line in text.splitlines()]
        return cls(
            group=group,
            rank=rank,
            step=step,
            error_type=type(error).__name__,
            message=redacted(last_line(error)),
            location=location,
            tail=tuple(redacted(line)[:_MAX_MESSAGE_CHARS] for line in lines[-_TAIL_LINES:]),
            log=log,
        )

    @property
    def is_lost_peer(self) -> bool:
        """Whether this is a consequence of another rank's failure: a lost connection or a timeout."""
        return self.error_type in _LOST_PEER_TYPES or _LOST_PEER.search(self.message) is not None

    @property
    def step_text(self) -> str:
        """The step in which it occurred, for messages."""
        return "before the first step" if self.step is None else f"in step {self.step + 1}"

    def matches(self, other: Failure) -> bool:
        """Return whether step, location and message are equal, apart from numbers in the message."""
        message, other_message = (_VARYING.sub("#", failure.message) for failure in (self, other))
        return (self.step, self.error_type, self.location, message) == (
            other.step,
            other.error_type,
            other.location,
            other_message,
        )


def is_deterministic(failures: Sequence[Failure]) -> bool:
    """Return whether the newest failure also ended the previous attempt, so that a retry would fail again.

    Args:
        failures: All reported failures, in order.
    """
    newest = failures[-1]
    earlier = [failure for failure in failures if failure.group != newest.group]
    if newest.is_lost_peer or not earlier:
        return False
    return any(failure.matches(newest) for failure in earlier if failure.group == earlier[-1].group)


def root_cause(failures: Sequence[Failure]) -> Failure | None:
    """Return the first failure of the last attempt that is not merely a lost connection."""
    last_attempt = [failure for failure in failures if failure.group == failures[-1].group]
    return next((failure for failure in last_attempt if not failure.is_lost_peer), None)


def deterministic_failure_error(failure: Failure) -> TrainingError:
    """Return the error for a failure that occurred in two attempts in a row."""
    return TrainingError(
        f"rank {failure.rank} failed twice in the same way {failure.step_text} ({failure.error_type}: "
        f"{failure.message}), so the run is not retried; the full traceback is in {failure.log} and ends "
        f"with{_indented(failure.tail)}"
    )


def worker_group_error(
    error: BaseException,
    failures: Sequence[Failure],
    max_failures: int,
    logs: Path,
    node_memory_remedy: str = "place fewer workers on a node, or use nodes with more memory",
) -> OrchestratorError:
    """Return the error for a run whose worker group failed more than max_failures times.

    Args:
        error: The exception of Ray Train.
        failures: What the ranks reported before they ended, in order.
        max_failures: How often the group was restarted.
        logs: Directory of the run's logs.
        node_memory_remedy: What to do if a node ran out of host memory.
    """
    by_rank = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in by_rank.values()]
    for cause in causes:
        if isinstance(cause, OrchestratorError):
            return cause
    for cause in causes:
        if type(cause).__name__ == "OutOfMemoryError" or _KILLED_FOR_MEMORY.search(str(cause)):
            return MemoryExhaustedError(
                f"Ray killed a worker because its node ran out of memory; {node_memory_remedy}"
            )
    root = root_cause(failures) if failures else None
    if root:
        reason = f"rank {root.rank} {root.step_text}: {root.error_type}: {root.message}"
        details = f"the full traceback is in {root.log} and ends with{_indented(root.tail)}"
    else:
        lines = [f"rank {rank}: {last_line(failure)}" for rank, failure in sorted(by_rank.items())]
        reason = "; ".join((lines or [last_line(error)])[:4])
        details = f"the logs of the ranks are in {logs}"
    return TrainingError(
        f"the worker group failed {max_failures + 1} times and run.max_failures={max_failures}; the last "
        f"failure: {reason}; run the job again to resume from the last checkpoint; {details}"
    )


def last_line(error: BaseException) -> str:
    """Return the last line of a message: Ray puts a traceback before the line that names the error."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_MAX_MESSAGE_CHARS]


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
