"""What went wrong on the workers: which rank's exception is the cause, and whether trying again can help.

When a rank fails, the others usually report no more than a lost connection. And an exception that comes back
at the same step will come back a third time, while a killed process or a lost node may not.
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
_LONGEST_MESSAGE = 300
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")
# What gloo, NCCL, sockets and Ray say where a process at the other end is gone or late.
_LOST_PEER = re.compile(
    r"connection (was |is |has been )?(closed|reset|refused|aborted|lost)|broken pipe|remote process exited"
    r"|remote peer|socket (timeout|closed)|timed? ?out|no route to host|ncclRemoteError|ncclSystemError"
    r"|unhandled system error|heartbeat",
    re.IGNORECASE,
)
_LOST_PEER_KINDS = frozenset(
    {"DistNetworkError", "DistStoreError", "RayActorError", "ActorDiedError", "ActorUnavailableError"}
)
# What Ray writes where its memory monitor ends a task, and an actor.
_KILLED_FOR_MEMORY = re.compile(r"running low on memory|address the out of memory issue")


@dataclass(frozen=True)
class Failure:
    """An exception that a rank raised.

    Attributes:
        group: Names the worker group; another try has another group.
        rank: Who raised it.
        step: Steps that were done, or None before the first.
        kind: Class of the exception.
        message: Its message, in one line.
        place: File and line that raised it.
        tail: The last lines of its traceback.
        log: The file with the whole traceback.
    """

    group: str
    rank: int
    step: int | None
    kind: str
    message: str
    place: str
    tail: tuple[str, ...]
    log: str

    @classmethod
    def of(cls, error: BaseException, group: str, rank: int, step: int | None, log: str) -> Failure:
        """Return what is to be known of an exception that was caught."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        lines = [line for text in traceback.format_exception(error) for line in text.splitlines()]
        return cls(
            group=group,
            rank=rank,
            step=step,
            kind=type(error).__name__,
            message=redacted(first_line(error)),
            place=place,
            tail=tuple(redacted(line)[:_LONGEST_MESSAGE] for line in lines[-_TAIL_LINES:]),
            log=log,
        )

    @property
    def is_of_a_peer(self) -> bool:
        """Whether this is how a rank sees that another one is gone, which says nothing of why."""
        return self.kind in _LOST_PEER_KINDS or _LOST_PEER.search(self.message) is not None

    @property
    def when(self) -> str:
        """At which step, as messages call it."""
        return "before its first step" if self.step is None else f"in step {self.step + 1}"

    def is_like(self, other: Failure) -> bool:
        """Tell whether two tries failed at the same step and place with the same message, numbers aside."""
        mine, theirs = (_VARYING.sub("#", each.message) for each in (self, other))
        return (self.step, self.kind, self.place, mine) == (other.step, other.kind, other.place, theirs)


def comes_back(failures: Sequence[Failure]) -> bool:
    """Tell whether the newest failure is that of the try before, so that a third one would meet it as well.

    Args:
        failures: What was reported, in order.
    """
    newest = failures[-1]
    earlier = [each for each in failures if each.group != newest.group]
    if newest.is_of_a_peer or not earlier:
        return False
    return any(each.is_like(newest) for each in earlier if each.group == earlier[-1].group)


def cause_of(failures: Sequence[Failure]) -> Failure | None:
    """Return what made the last try fail: the first exception that is not just a lost connection."""
    last = [each for each in failures if each.group == failures[-1].group]
    return next((each for each in last if not each.is_of_a_peer), None)


def hopeless(failure: Failure) -> TrainingError:
    """Return the error for a failure that came back."""
    return TrainingError(
        f"rank {failure.rank} failed twice in the same way {failure.when} ({failure.kind}: "
        f"{failure.message}), so the run is not tried again; the whole traceback is in {failure.log}, and "
        f"ends with{_indented(failure.tail)}"
    )


def explain(
    error: BaseException,
    failures: Sequence[Failure],
    max_failures: int,
    logs: Path,
    node_remedies: str = "place fewer workers on a node, or use nodes with more memory",
) -> OrchestratorError:
    """Return the error for a run whose worker group failed more often than it may.

    Args:
        error: What Ray Train raised.
        failures: What ranks could still report, in order.
        max_failures: How often the group was started again.
        logs: Folder of the run's logs.
        node_remedies: What helps where the host memory of a node ran out.
    """
    by_rank = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in by_rank.values()]
    for cause in causes:
        if isinstance(cause, OrchestratorError):
            return cause
    for cause in causes:
        if type(cause).__name__ == "OutOfMemoryError" or _KILLED_FOR_MEMORY.search(str(cause)):
            return MemoryExhaustedError(
                f"Ray ended a worker because its node ran out of memory; {node_remedies}"
            )
    reported = cause_of(failures) if failures else None
    if reported:
        reason = f"rank {reported.rank} {reported.when}: {reported.kind}: {reported.message}"
        where = f"the whole traceback is in {reported.log}, and ends with{_indented(reported.tail)}"
    else:
        lines = [f"rank {rank}: {first_line(failure)}" for rank, failure in sorted(by_rank.items())]
        reason = "; ".join((lines or [first_line(error)])[:4])
        where = f"the ranks' own words are in {logs}"
    return TrainingError(
        f"the worker group failed {max_failures + 1} times and run.max_failures={max_failures}; the last "
        f"failure: {reason}; run the job again, and it goes on from the last checkpoint; {where}"
    )


def first_line(error: BaseException) -> str:
    """Return the last line of a message, which names the error where Ray puts a traceback before it."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LONGEST_MESSAGE]


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
