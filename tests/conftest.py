"""Fixtures and helpers of the end-to-end tests: the command line, and one undisturbed run to compare with."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import load

ROOT = Path(__file__).resolve().parents[1]
os.environ["ORCHESTRATOR_CALIBRATION"] = ""  # tests neither read nor write this machine's calibration store
os.environ["ORCHESTRATOR_TARGETS"] = ""  # nor register their endpoints with a Prometheus on this machine
# One thread per process: on a busy machine, two make a matmul of the tiny models many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest_plugins = ["tests.support.tiers"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_USAGE_STATS_ENABLED": "0",
    **load.RAY,
}


@dataclass
class Finished:
    """Exit code, stdout and stderr of a finished command."""

    code: int
    out: str
    err: str


def start(
    *arguments: str, cwd: Path, options: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start `orchestrator` in a new session, so that a test can signal its whole process group.

    Args:
        *arguments: Arguments of `orchestrator`.
        cwd: Working directory.
        options: Options of the Python interpreter.
        **environment: Environment variables in addition to `ENVIRONMENT`.

    Returns:
        The running process. SIGINT and SIGHUP have their default handlers: tests that were started in the
        background, or with nohup, inherit that these signals are ignored.
    """

    def prepare() -> None:
        os.nice(load.niceness())
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *options, "-m", "orchestrator", *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> Finished:
    """Wait for a command to exit; kill it and fail the test after `timeout` seconds."""
    timeout *= load.PATIENCE
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the command did not end within {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return Finished(process.returncode, out, err)


def orchestrator(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> Finished:
    """Run `orchestrator` until it exits; assert that its output has no traceback, whatever the exit code."""
    done = finish(start(*arguments, cwd=cwd, **environment), timeout)
    assert "Traceback (most recent call last)" not in done.out + done.err, done.err
    return done


def processes_of(marker: str) -> list[int]:
    """Return the pids of the live processes whose environment contains a text.

    With a marker unique to one command, these are exactly the processes that the command started.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue
            if marker.encode() in environment and state != "Z":
                found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll a condition and return its first true value; fail the test after `seconds` seconds."""
    seconds *= load.PATIENCE
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"after {seconds} s still not: {what}")


def step_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's steps.jsonl, without a last line that is not complete yet."""
    try:
        text = (run / "steps.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def losses(run: Path) -> dict[int, float]:
    """Return the loss of every step; for a step that was repeated after a restart, the last one."""
    return {int(row["step"]): row["loss"] for row in step_rows(run)}


def job_text(storage: Path, **changes: Any) -> str:
    """Return the YAML of the end-to-end job: two workers, ZeRO-3, 12 steps.

    Args:
        storage: `checkpoint.storage`.
        **changes: `section__key=value` replaces one field, `section=value` a whole section.
    """
    job: dict[str, Any] = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": 256},
        "parallel": {"workers": 2, "zero_stage": 3},
        "eval": {"data": [{"path": "builtin/alpaca_sample_eval"}]},
        "optim": {"lr": 1e-3, "global_batch_size": 4, "max_steps": 12},
        "checkpoint": {"storage": str(storage)},
        "metrics": {"port": 0},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            job.setdefault(section, {})[key] = value
        else:
            job[section] = value
    return yaml.safe_dump(job)


@dataclass
class Observed:
    """An undisturbed run, and the steps that its metrics endpoint reported while it ran.

    Attributes:
        folder: Run directory.
        report: The report that `train --json` printed.
        polls: Pairs of time (`time.monotonic`, in seconds) and reported step.
        said: stderr of the command.
    """

    folder: Path
    report: dict[str, Any]
    polls: list[tuple[float, int]] = field(default_factory=list)
    said: str = ""


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Train the job once per session on one node, polling its metrics endpoint for the current step."""
    return load.once(tmp_path_factory, "undisturbed", _observe_a_run)


def _observe_a_run(home: Path) -> Observed:
    (home / "job.yaml").write_text(job_text(home / "runs"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calibration = {"ORCHESTRATOR_CALIBRATION": str(home / "calibration.jsonl")}
    command = ("train", "job.yaml", "--json", "--set", f"metrics.port={port}")
    with load.timed():  # the times in its report are compared with the polled ones
        process = start(*command, cwd=home, **calibration)
    polls = list(_poll_steps(process, port))
    done = finish(process)
    assert done.code == 0, done.err
    return Observed(home / "runs" / "run", json.loads(done.out), polls, done.err)


def _poll_steps(process: subprocess.Popen[str], port: int) -> Iterator[tuple[float, int]]:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except OSError:
            time.sleep(0.05)
            continue
        now = time.monotonic()
        for line in text.splitlines():
            if line.startswith("orchestrator_step{"):
                yield now, int(float(line.rsplit(" ", 1)[1]))
        time.sleep(0.01)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Collect the messages that the `orchestrator` logger emits at INFO and above during the test."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("orchestrator")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)
