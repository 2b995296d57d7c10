"""Which exception is the cause, and which comes back however often the run is tried."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import MemoryExhaustedError, SpecError, TrainingError
from orchestrator.run.failures import Failure, cause_of, comes_back, explain, hopeless


def caught(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:
        return raised


def failure(error: Exception, group: str = "a", rank: int = 0, step: int | None = 4) -> Failure:
    return Failure.of(caught(error), group, rank, step, "/runs/r/logs/rank-0.attempt-1.log")


LOST = [
    "Connection closed by peer [127.0.0.1]:43545",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection reset by peer",
    "NCCL error: remote process exited or there was a network error, NCCL version 2.27",
    "Timed out waiting 1800000ms for recv operation to complete",
    "[Errno 32] Broken pipe",
]


@pytest.mark.parametrize("message", LOST)
def test_a_lost_peer_is_no_cause_and_is_tried_again(message: str) -> None:
    lost = failure(RuntimeError(message))
    assert lost.is_of_a_peer
    assert not comes_back([lost, replace(lost, group="b")])
    real = failure(IndexError("index out of range in self"), rank=3)
    assert cause_of([lost, real]) is real
    assert cause_of([real, replace(lost, group="b")]) is None, "of the try before"


def test_the_same_exception_at_the_same_step_comes_back() -> None:
    first = failure(TypeError("bad operand at 0x7f01, 17 bytes"))
    again = replace(first, group="b", message="bad operand at 0x8a44, 18 bytes")
    assert comes_back([first, again])
    assert comes_back([first, failure(RuntimeError(LOST[0]), "a", 1), again])
    assert comes_back([first, replace(again, rank=1)]), "whichever rank is the first to say it"


@pytest.mark.parametrize(
    "change",
    [
        {"group": "a"},  # another rank of the same try
        {"step": 5},
        {"step": None},
        {"kind": "ValueError"},
        {"message": "something else"},
        {"place": "elsewhere.py:1"},
    ],
)
def test_another_failure_is_tried_again(change: dict[str, object]) -> None:
    first = failure(TypeError("bad operand"))
    assert not comes_back([first, replace(first, **{"group": "b", **change})])  # type: ignore[arg-type]


def test_only_two_tries_in_a_row_count() -> None:
    first = failure(TypeError("bad operand"))
    other = failure(ValueError("a flipped bit"), "b")
    assert not comes_back([first, other, replace(first, group="c")])
    assert comes_back([first, other, replace(other, group="c")])


def test_the_model_may_fail_before_the_first_step() -> None:
    first = failure(AttributeError("no such layer"), step=None)
    assert comes_back([first, replace(first, group="b")])
    assert "failed twice in the same way before its first step (AttributeError: no such layer)" in str(
        hopeless(first)
    )


def test_the_message_ends_with_the_end_of_the_traceback_and_names_its_file() -> None:
    text = str(hopeless(failure(TypeError("bad operand"))))
    assert "in step 5" in text
    assert "the whole traceback is in /runs/r/logs/rank-0.attempt-1.log" in text
    lines = text.splitlines()
    assert lines[-1].strip() == "TypeError: bad operand"
    assert "raise error" in lines[-2]
    assert "Traceback (most recent call last)" not in text


def test_secrets_of_the_environment_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "k3y-of-mine")
    found = failure(ValueError("401 for k3y-of-mine"))
    assert "k3y-of-mine" not in str(hopeless(found))
    assert "401 for [MY_API_KEY]" in found.message


class Failed(Exception):
    def __init__(self, **workers: Exception) -> None:
        super().__init__("training failed")
        self.worker_failures = {int(name.removeprefix("r")): error for name, error in workers.items()}


LOGS = Path("/runs/r/logs")


def test_a_run_without_tries_left_names_the_cause_and_its_file() -> None:
    reported = [failure(RuntimeError(LOST[0]), rank=1), failure(ValueError("bad row"), rank=2)]
    error = explain(Failed(r1=RuntimeError(LOST[0])), reported, 0, LOGS)
    assert isinstance(error, TrainingError)
    assert (
        "failed 1 times and run.max_failures=0; the last failure: rank 2 in step 5: ValueError: bad row"
        in str(error)
    )
    assert "rank-0.attempt-1.log" in str(error)


def test_a_killed_worker_reports_nothing_and_the_folder_is_named() -> None:
    error = explain(Failed(r0=RuntimeError("worker died\nexit code -9")), [], 3, LOGS)
    assert "failed 4 times" in str(error)
    assert "rank 0: exit code -9" in str(error)
    assert str(LOGS) in str(error)
    assert "logs of Ray" not in str(error)


def test_what_is_ours_is_the_error_and_memory_has_a_remedy() -> None:
    ours = SpecError("model.path=x is not there; name another")
    assert explain(Failed(r0=RuntimeError("x"), r1=ours), [], 3, LOGS) is ours
    killed = RuntimeError("Task was killed due to the node running low on memory.")
    assert isinstance(explain(Failed(r0=killed), [], 3, LOGS), MemoryExhaustedError)
