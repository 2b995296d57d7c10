"""Failures: selection of the root cause, and detection of deterministic exceptions."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import MemoryExhaustedError, SpecError, TrainingError
from orchestrator.run.failures import (
    Failure,
    deterministic_failure_error,
    is_deterministic,
    root_cause,
    worker_group_error,
)


def caught(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:
        return raised


def failure(error: Exception, group: str = "a", rank: int = 0, step: int | None = 4) -> Failure:
    return Failure.from_exception(caught(error), group, rank, step, "/runs/r/logs/rank-0.attempt-1.log")


LOST = [
    "Connection closed by peer [127.0.0.1]:43545",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection reset by peer",
    "NCCL error: remote process exited or there was a network error, NCCL version 2.27",
    "Timed out waiting 1800000ms for recv operation to complete",
    "[Errno 32] Broken pipe",
]


@pytest.mark.parametrize("message", LOST)
def test_a_lost_connection_is_not_the_root_cause_and_is_retried(message: str) -> None:
    lost = failure(RuntimeError(message))
    assert lost.is_lost_peer
    assert not is_deterministic([lost, replace(lost, group="b")])
    real = failure(IndexError("index out of range in self"), rank=3)
    assert root_cause([lost, real]) is real
    assert root_cause([real, replace(lost, group="b")]) is None, "it belongs to the previous attempt"


def test_the_same_exception_at_the_same_step_is_deterministic() -> None:
    first = failure(TypeError("bad operand at 0x7f01, 17 bytes"))
    again = replace(first, group="b", message="bad operand at 0x8a44, 18 bytes")
    assert is_deterministic([first, again])
    assert is_deterministic([first, failure(RuntimeError(LOST[0]), "a", 1), again])
    assert is_deterministic([first, replace(again, rank=1)]), "whichever rank reports it first"


@pytest.mark.parametrize(
    "change",
    [
        {"group": "a"},  # another rank of the same attempt
        {"step": 5},
        {"step": None},
        {"error_type": "ValueError"},
        {"message": "something else"},
        {"location": "elsewhere.py:1"},
    ],
)
def test_a_different_failure_is_retried(change: dict[str, object]) -> None:
    first = failure(TypeError("bad operand"))
    assert not is_deterministic([first, replace(first, **{"group": "b", **change})])  # type: ignore[arg-type]


def test_only_two_attempts_in_a_row_count() -> None:
    first = failure(TypeError("bad operand"))
    other = failure(ValueError("a flipped bit"), "b")
    assert not is_deterministic([first, other, replace(first, group="c")])
    assert is_deterministic([first, other, replace(other, group="c")])


def test_a_failure_before_the_first_step_can_be_deterministic() -> None:
    first = failure(AttributeError("no such layer"), step=None)
    assert is_deterministic([first, replace(first, group="b")])
    assert "failed twice in the same way before the first step (AttributeError: no such layer)" in str(
        deterministic_failure_error(first)
    )


def test_the_error_ends_with_the_tail_of_the_traceback_and_names_the_log() -> None:
    text = str(deterministic_failure_error(failure(TypeError("bad operand"))))
    assert "in step 5" in text
    assert "the full traceback is in /runs/r/logs/rank-0.attempt-1.log" in text
    lines = text.splitlines()
    assert lines[-1].strip() == "TypeError: bad operand"
    assert "raise error" in lines[-2]
    assert "Traceback (most recent call last)" not in text


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "k3y-of-mine")
    rejected = failure(ValueError("401 for k3y-of-mine"))
    assert "k3y-of-mine" not in str(deterministic_failure_error(rejected))
    assert "401 for [MY_API_KEY]" in rejected.message


class Failed(Exception):
    def __init__(self, **workers: Exception) -> None:
        super().__init__("training failed")
        self.worker_failures = {int(name.removeprefix("r")): error for name, error in workers.items()}


LOGS = Path("/runs/r/logs")


def test_the_error_of_a_run_without_retries_left_names_the_root_cause_and_its_log() -> None:
    reported = [failure(RuntimeError(LOST[0]), rank=1), failure(ValueError("bad row"), rank=2)]
    error = worker_group_error(Failed(r1=RuntimeError(LOST[0])), reported, 0, LOGS)
    assert isinstance(error, TrainingError)
    assert (
        "failed 1 times and run.max_failures=0; the last failure: rank 2 in step 5: ValueError: bad row"
        in str(error)
    )
    assert "rank-0.attempt-1.log" in str(error)


def test_the_error_for_a_killed_worker_names_the_log_directory() -> None:
    error = worker_group_error(Failed(r0=RuntimeError("worker died\nexit code -9")), [], 3, LOGS)
    assert "failed 4 times" in str(error)
    assert "rank 0: exit code -9" in str(error)
    assert str(LOGS) in str(error)
    assert "logs of Ray" not in str(error)


def test_our_own_error_is_returned_as_it_is_and_a_kill_for_memory_is_recognised() -> None:
    ours = SpecError("model.path=x is not there; name another")
    assert worker_group_error(Failed(r0=RuntimeError("x"), r1=ours), [], 3, LOGS) is ours
    killed = RuntimeError("Task was killed due to the node running low on memory.")
    assert isinstance(worker_group_error(Failed(r0=killed), [], 3, LOGS), MemoryExhaustedError)
