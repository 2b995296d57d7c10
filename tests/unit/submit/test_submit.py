"""Following a submitted job: its log, its exit code, and what Ctrl-C does."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from orchestrator.config.schema import CheckpointSpec, DataSpec, JobSpec, ModelSpec, SourceSpec
from orchestrator.errors import ClusterError
from orchestrator.submit import job_log, submit

JOB = JobSpec(
    name="run",
    model=ModelSpec(path="m"),
    data=DataSpec(train=(SourceSpec(path="d"),)),
    checkpoint=CheckpointSpec(storage="/mnt/all runs"),
)


@dataclass
class Client:
    """Mock of Ray's job client: a list of job states, each with the chunks that the log stream yields.

    An exception as a state is raised by `get_job_info`, one among the chunks by the stream.
    """

    states: list[tuple[Any, list[Any]]]
    code: int | None = None
    whole: str = ""
    message: str | None = None
    stopped: list[str] = field(default_factory=list)
    streams: int = 0
    fetched: int = 0

    def get_job_info(self, submission_id: str) -> Any:
        state = self.states.pop(0)[0] if len(self.states) > 1 else self.states[0][0]
        if isinstance(state, BaseException):
            raise state
        ended = state in ("SUCCEEDED", "FAILED", "STOPPED")
        status = type("Status", (str,), {"is_terminal": lambda _: ended})(state)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=self.message)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        self.streams += 1
        for chunk in self.states[0][1]:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def get_job_logs(self, submission_id: str) -> str:
        self.fetched += 1
        return self.whole

    def stop_job(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.states = [("STOPPED", [])]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_SECONDS_BETWEEN_TRIES", 0.0)


def follow(client: Client) -> tuple[int, list[str]]:
    lines: list[str] = []
    return submit._follow(client, "run-1", "http://head:8265", lines.append), lines


def answers(monkeypatch: pytest.MonkeyPatch, text: str, tty: bool = True) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_the_log_is_streamed_and_the_exit_code_is_that_of_the_run() -> None:
    client = Client([("SUCCEEDED", ["a\nb", "b\n\nc", "\nend"])])
    assert follow(client) == (0, ["a", "bb", "", "c", "end"])
    assert client.fetched == 0, "a complete stream needs no extra request"
    assert follow(Client([("FAILED", ["x\n"])], code=4)) == (4, ["x"])
    assert follow(Client([("STOPPED", [])]))[0] == 143


def test_the_error_names_why_the_command_never_started() -> None:
    with pytest.raises(ClusterError, match=r"runtime env: no space\); see `ray job status"):
        follow(Client([("FAILED", [])], message="runtime env:\n no space"))


def test_every_line_is_printed_once_if_the_stream_breaks_within_a_line() -> None:
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    client = Client(
        [("RUNNING", ["é1\nl", broken]), ("RUNNING", ["é1\nli", broken]), ("SUCCEEDED", ["é1\nline 2\n3"])],
        whole="é1\nline",
    )
    assert follow(client) == (0, ["é1", "line 2", "3"])
    assert client.streams == 3


def test_the_log_is_fetched_if_streaming_is_blocked() -> None:
    blocked = aiohttp.ClientError("101 expected")
    client = Client([("RUNNING", [blocked]), ("SUCCEEDED", [blocked])], whole="a\nb\n")
    assert follow(client) == (0, ["a", "b"])


def test_a_silent_stream_of_a_lost_cluster_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class SilentClient(Client):
        async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
            await asyncio.sleep(60)
            yield ""

    monkeypatch.setattr(job_log, "_SECONDS_OF_SILENCE", 0.01)
    with pytest.raises(ClusterError, match="lost the cluster"):
        follow(SilentClient([("RUNNING", []), ("RUNNING", []), (ConnectionError("gone"), [])]))


@pytest.mark.parametrize(("answer", "stops"), [("y\n", True), ("yes\n", True), ("\n", False), ("", False)])
def test_ctrl_c_asks_whether_to_stop_the_job(
    answer: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, answer)
    client = Client([(KeyboardInterrupt(), []), ("SUCCEEDED", [])])
    if stops:
        assert follow(client)[0] == 130
        assert client.stopped == ["run-1"]
        return
    with pytest.raises(KeyboardInterrupt):
        follow(client)
    assert client.stopped == []


def test_without_a_terminal_the_job_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "y\n", tty=False)
    client = Client([(KeyboardInterrupt(), []), ("SUCCEEDED", [])])
    with pytest.raises(KeyboardInterrupt):
        follow(client)
    assert client.stopped == []


def test_the_error_for_a_lost_cluster_has_the_command_to_follow_again() -> None:
    with pytest.raises(ClusterError, match=r"ray job logs --follow --address http://head:8265 run-1"):
        follow(Client([(ConnectionError("gone"), []), ("SUCCEEDED", [])]))


def test_doctor_runs_before_training_unless_disabled() -> None:
    train = "python -m orchestrator train job.yaml --address auto"
    assert submit.entrypoint(JOB, run_doctor=False) == train
    doctor = "python -m orchestrator doctor --address auto --storage '/mnt/all runs' && "
    assert submit.entrypoint(JOB, run_doctor=True) == doctor + train
