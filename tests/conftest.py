"""What end-to-end tests share: the command line as users run it, and one undisturbed run to compare with."""

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
# Real Alpaca rows, to be measured with and not shipped; where there are any they lie beside the checkout.
REAL_ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en.json"
os.environ["ORCHESTRATOR_CALIBRATION"] = ""  # tests neither use nor leave what runs here measured
os.environ["ORCHESTRATOR_TARGETS"] = ""  # nor list their endpoints for a Prometheus of this machine
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
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
    """How a command ended."""

    code: int
    out: str
    err: str


def start(
    *arguments: str, cwd: Path, options: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start `orchestrator` with arguments, in a process group of its own, where signals can reach it.

    `options` are Python's. A shell that starts tests in the background has them ignore SIGINT, nohup SIGHUP,
    and that is inherited.
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
    """Wait for a command; one that hangs is killed and fails the test."""
    timeout *= load.PATIENCE
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the command did not end within {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return Finished(process.returncode, out, err)


def orchestrator(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> Finished:
    """Run `orchestrator` with arguments to its end; no way of failing may show a traceback."""
    done = finish(start(*arguments, cwd=cwd, **environment), timeout)
    assert "Traceback (most recent call last)" not in done.out + done.err, done.err
    return done


def processes_of(marker: str) -> list[int]:
    """Return the processes whose environment holds a text: all that a command started, and only that."""
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
    """Return the first true value of a condition; fail after so many seconds."""
    seconds *= load.PATIENCE
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"after {seconds} s still not: {what}")


def step_rows(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's steps.jsonl."""
    try:
        text = (run / "steps.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def losses(run: Path) -> dict[int, float]:
    """Return the loss at every step; of a step that was done twice, the last."""
    return {int(row["step"]): row["loss"] for row in step_rows(run)}


def job_text(storage: Path, **changes: Any) -> str:
    """Return the job that end-to-end tests train: two workers, ZeRO-3, twelve steps."""
    data = str(REAL_ALPACA) if REAL_ALPACA.exists() else "builtin/alpaca_sample"
    job: dict[str, Any] = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": data}], "max_length": 512},
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
    """An undisturbed run, and what was seen of it from outside while it went on."""

    folder: Path
    report: dict[str, Any]
    polls: list[tuple[float, int]] = field(default_factory=list)
    said: str = ""


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Train the job once on one node, asking its endpoint for the step all the while."""
    return load.once(tmp_path_factory, "undisturbed", _observe_a_run)


def _observe_a_run(home: Path) -> Observed:
    (home / "job.yaml").write_text(job_text(home / "runs"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calibration = {"ORCHESTRATOR_CALIBRATION": str(home / "calibration.jsonl")}
    command = ("train", "job.yaml", "--json", "--set", f"metrics.port={port}")
    with load.timed():  # its report is compared with what is seen from outside
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
    """Return the messages that this program logs at INFO and above while the test runs, as they come."""
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
