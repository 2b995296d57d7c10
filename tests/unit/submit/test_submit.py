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
    """Stands for Ray's: each state of the job comes with what a stream gives until it breaks, or ends.

    An exception for a state is raised when the state is asked for, one among the pieces by the stream.
    """

    states: list[tuple[Any, list[Any]]]
    code: int | None = None
    whole: str = ""
    message: str | None = None
    stopped: list[str] = field(default_factory=list)
    streams: int = 0
    fetched: int = 0

    def get_job_info(self, identity: str) -> Any:
        state = self.states.pop(0)[0] if len(self.states) > 1 else self.states[0][0]
        if isinstance(state, BaseException):
            raise state
        ended = state in ("SUCCEEDED", "FAILED", "STOPPED")
        status = type("Status", (str,), {"is_terminal": lambda _: ended})(state)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=self.message)

    async def tail_job_logs(self, identity: str) -> AsyncIterator[str]:
        self.streams += 1
        for piece in self.states[0][1]:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def get_job_logs(self, identity: str) -> str:
        self.fetched += 1
        return self.whole

    def stop_job(self, identity: str) -> None:
        self.stopped.append(identity)
        self.states = [("STOPPED", [])]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_SECONDS_BETWEEN_TRIES", 0.0)


def follow(client: Client) -> tuple[int, list[str]]:
    said: list[str] = []
    return submit._follow(client, "run-1", "http://head:8265", said.append), said


def answers(monkeypatch: pytest.MonkeyPatch, text: str, tty: bool = True) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_the_log_is_shown_as_it_grows_and_the_exit_code_is_that_of_the_run() -> None:
    client = Client([("SUCCEEDED", ["a\nb", "b\n\nc", "\nend"])])
    assert follow(client) == (0, ["a", "bb", "", "c", "end"])
    assert client.fetched == 0, "what has come is not fetched again"
    assert follow(Client([("FAILED", ["x\n"])], code=4)) == (4, ["x"])
    assert follow(Client([("STOPPED", [])]))[0] == 143


def test_a_job_whose_command_never_ran_says_why() -> None:
    with pytest.raises(ClusterError, match=r"runtime env: no space\); see `ray job status"):
        follow(Client([("FAILED", [])], message="runtime env:\n no space"))


def test_every_line_comes_once_also_when_the_stream_breaks_in_the_middle_of_one() -> None:
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    client = Client(
        [("RUNNING", ["é1\nl", broken]), ("RUNNING", ["é1\nli", broken]), ("SUCCEEDED", ["é1\nline 2\n3"])],
        whole="é1\nline",
    )
    assert follow(client) == (0, ["é1", "line 2", "3"])
    assert client.streams == 3


def test_a_log_comes_also_where_no_stream_is_let_through() -> None:
    refused = aiohttp.ClientError("101 expected")
    client = Client([("RUNNING", [refused]), ("SUCCEEDED", [refused])], whole="a\nb\n")
    assert follow(client) == (0, ["a", "b"])


def test_a_silent_stream_is_told_from_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Client):
        async def tail_job_logs(self, identity: str) -> AsyncIterator[str]:
            await asyncio.sleep(60)
            yield ""

    monkeypatch.setattr(job_log, "_SECONDS_OF_SILENCE", 0.01)
    with pytest.raises(ClusterError, match="lost the cluster"):
        follow(Gone([("RUNNING", []), ("RUNNING", []), (ConnectionError("gone"), [])]))


@pytest.mark.parametrize(("answer", "stops"), [("y\n", True), ("yes\n", True), ("\n", False), ("", False)])
def test_ctrl_c_asks_once_whether_the_job_is_to_end(
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


def test_where_nobody_can_answer_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "y\n", tty=False)
    client = Client([(KeyboardInterrupt(), []), ("SUCCEEDED", [])])
    with pytest.raises(KeyboardInterrupt):
        follow(client)
    assert client.stopped == []


def test_a_cluster_that_is_lost_is_told_with_the_command_that_follows_again() -> None:
    with pytest.raises(ClusterError, match=r"ray job logs --follow --address http://head:8265 run-1"):
        follow(Client([(ConnectionError("gone"), []), ("SUCCEEDED", [])]))


def test_the_nodes_are_looked_at_first_unless_told_otherwise() -> None:
    train = "python -m orchestrator train job.yaml --address auto"
    assert submit.entrypoint(JOB, look_first=False) == train
    looked = "python -m orchestrator doctor --address auto --storage '/mnt/all runs' && "
    assert submit.entrypoint(JOB, look_first=True) == looked + train
