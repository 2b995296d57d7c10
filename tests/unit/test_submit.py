"""Following a submitted job: its log, its exit code, and what Ctrl-C does."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from launch import submit
from orchestrator.errors import ClusterError
from orchestrator.spec import CheckpointSpec, DataSpec, JobSpec, ModelSpec, SourceSpec

JOB = JobSpec(
    name="run",
    model=ModelSpec(path="m"),
    data=DataSpec(train=(SourceSpec(path="d"),)),
    checkpoint=CheckpointSpec(storage="/mnt/all runs"),
)


@dataclass
class Client:
    """Stands for Ray's: gives one state of the job after another."""

    states: list[tuple[Any, str]]
    code: int | None = None
    stopped: list[str] = field(default_factory=list)

    def get_job_info(self, identity: str) -> Any:
        state, _ = self.states[0]
        if isinstance(state, BaseException):
            self.states.pop(0)
            raise state
        ended = state in ("SUCCEEDED", "FAILED", "STOPPED")
        status = type("Status", (str,), {"is_terminal": lambda _: ended})(state)
        return SimpleNamespace(status=status, driver_exit_code=self.code)

    def get_job_logs(self, identity: str) -> str:
        return self.states.pop(0)[1] if len(self.states) > 1 else self.states[0][1]

    def stop_job(self, identity: str) -> None:
        self.stopped.append(identity)
        self.states = [("STOPPED", "")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.0)


def follow(client: Client) -> tuple[int, list[str]]:
    said: list[str] = []
    return submit._follow(client, "run-1", "http://head:8265", said.append), said


def answers(monkeypatch: pytest.MonkeyPatch, text: str, tty: bool = True) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_the_log_is_shown_as_it_grows_and_the_exit_code_is_that_of_the_run() -> None:
    states = [("RUNNING", "a\n"), ("RUNNING", "a\nb\n"), ("SUCCEEDED", "a\nb\nc\n")]
    assert follow(Client(states)) == (0, ["a", "b", "c"])
    assert follow(Client([("FAILED", "x\n")], code=4)) == (4, ["x"])
    assert follow(Client([("FAILED", "x\n")])) == (3, ["x"])
    assert follow(Client([("STOPPED", "")]))[0] == 130


@pytest.mark.parametrize(("answer", "stops"), [("y\n", True), ("yes\n", True), ("\n", False), ("", False)])
def test_ctrl_c_asks_once_whether_the_job_is_to_end(
    answer: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, answer)
    client = Client([(KeyboardInterrupt(), ""), ("SUCCEEDED", "")])
    if stops:
        assert follow(client)[0] == 130
        assert client.stopped == ["run-1"]
        return
    with pytest.raises(KeyboardInterrupt):
        follow(client)
    assert client.stopped == []


def test_where_nobody_can_answer_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "y\n", tty=False)
    client = Client([(KeyboardInterrupt(), ""), ("SUCCEEDED", "")])
    with pytest.raises(KeyboardInterrupt):
        follow(client)
    assert client.stopped == []


def test_a_cluster_that_is_lost_is_told_with_the_command_that_follows_again() -> None:
    with pytest.raises(ClusterError, match=r"ray job logs --follow --address http://head:8265 run-1"):
        follow(Client([(ConnectionError("gone"), ""), ("SUCCEEDED", "")]))


def test_the_nodes_are_looked_at_first_unless_told_otherwise() -> None:
    train = "python -m launch.cli train job.yaml --address auto"
    assert submit.entrypoint(JOB, look_first=False) == train
    looked = "python -m launch.cli doctor --address auto --storage '/mnt/all runs' && "
    assert submit.entrypoint(JOB, look_first=True) == looked + train


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AuthenticationError("Authentication required: Unauthorized"), "has none; set RAY_AUTH_TOKEN"),
        (AuthenticationError("Authentication failed: a token is required"), "the one that it has"),
        (OSError("SSLError: CERTIFICATE_VERIFY_FAILED"), "with --certificate"),
        (ConnectionError("refused"), "check --address"),
    ],
)
def test_a_refusal_says_what_to_set(error: Exception, words: str) -> None:
    assert words in str(submit._refused("http://head:8265", error))
