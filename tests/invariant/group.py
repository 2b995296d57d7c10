"""Process groups for tests: starts the workers, waits for them, and reports the output of failed ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.invariant.template import Forked, Template
from tests.support import load

Process = subprocess.Popen[bytes] | Forked
ROOT = Path(__file__).resolve().parents[2]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Outcome:
    """Result of a task.

    Attributes:
        ranks: The JSON answer of every rank.
        arrays: The arrays that rank 0 wrote, by `KIND NAME`.
    """

    ranks: list[dict[str, Any]]
    arrays: Arrays

    @property
    def answer(self) -> dict[str, Any]:
        """The answer of rank 0."""
        return self.ranks[0]

    def kind(self, kind: str) -> Arrays:
        """Return the arrays of one kind (gradient, parameter, initial) by parameter name."""
        prefix = f"{kind} "
        return {
            name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)
        }


def assert_close(found: Arrays, expected: Arrays, relative: float) -> None:
    """Assert that |found - expected| <= relative x |expected| for each tensor, with the L2 norm."""
    worst, off = worst_difference(found, expected)
    assert off <= relative, f"{worst} is off by {off:.2e}"


def worst_difference(found: Arrays, expected: Arrays) -> tuple[str, float]:
    """Return the name of the tensor with the largest relative L2 error, and that error."""
    assert found.keys() == expected.keys()
    off = {
        name: float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    }
    worst = max(off, key=lambda name: off[name])
    return worst, off[worst]


def run_group(
    folder: Path,
    workers: int,
    tasks: list[dict[str, Any]],
    timeout_seconds: float = 240.0,
    module: str = "tests.invariant.worker",
    forked: bool = True,
) -> dict[str, Outcome]:
    """Run tasks one after another in a new group of processes that communicate over gloo.

    Args:
        folder: New folder for tasks, logs and results of the group.
        workers: Number of processes.
        tasks: Arguments of the module's functions; `name` is the key of the outcome, `action` the function.
        timeout_seconds: Seconds after which the group is killed.
        module: The module that each process runs.
        forked: Fork processes from a template that has already imported torch and others, which saves
            seconds; otherwise start new interpreters.

    Returns:
        The outcomes by name of the task.

    Raises:
        AssertionError: A process failed, or the timeout expired; the message includes the end of every log.
    """
    folder.mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    port = _free_port()
    logs = [folder / f"rank-{rank}.log" for rank in range(workers)]
    start = _fork if forked else _start
    environments = [_environment(rank, workers, port) for rank in range(workers)]
    processes = [start(module, folder, *each) for each in zip(environments, logs, strict=True)]
    try:
        failure = _wait(processes, time.monotonic() + timeout_seconds * load.PATIENCE)
        if failure is not None:
            _let_say_where_they_are(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failure is not None:
        said = "\n".join(f"--- rank {rank}\n{_tail(log)}" for rank, log in enumerate(logs))
        raise AssertionError(f"{failure}\n{said}")
    return {task["name"]: outcome_of(folder, task["name"], workers) for task in tasks}


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    # ninja, with which DeepSpeed compiles its operators, is in the folder of the interpreter.
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _start(module: str, folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", module, str(folder)],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(load.niceness()),
        )  # fmt: skip


def _fork(module: str, folder: Path, environment: dict[str, str], log: Path) -> Forked:
    # Two templates, so that neighbouring ranks have different hash seeds, as on different nodes: code that
    # depends on the order of a set then differs between ranks and is detected.
    return _template(int(environment["RANK"]) % 2).fork(module, str(folder), environment, log)


@cache
def _template(number: int) -> Template:
    return Template(_environment(number, 1, 0))


def _wait(processes: Sequence[Process], deadline: float) -> str | None:
    """Wait until all processes succeed or the first one fails, since the others may block in a collective.

    Returns:
        A description of the failure, or None.
    """
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} ended with code {code}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    running = [rank for rank, process in enumerate(processes) if process.poll() is None]
    return f"ranks {running} did not end in time"


def _let_say_where_they_are(processes: Sequence[Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGABRT)  # faulthandler writes the stack of every thread
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def has_outcome(folder: Path, name: str, workers: int) -> bool:
    """Return whether every rank has finished a task; rank 0 writes its arrays after its answer."""
    later = folder / f"{name}.npz"
    return later.exists() and all((folder / f"{name}.{rank}.json").exists() for rank in range(workers))


def outcome_of(folder: Path, name: str, workers: int) -> Outcome:
    """Read the outcome of a finished task."""
    answers = [
        json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)
    ]
    path = folder / f"{name}.npz"
    if not path.exists():
        return Outcome(answers, {})
    with np.load(path) as arrays:
        return Outcome(answers, dict(arrays))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
