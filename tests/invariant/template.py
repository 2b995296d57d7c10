"""A template process that has imported torch, DeepSpeed and transformers, and forks the workers of groups.

Importing takes 5 s of CPU time, and the tests start about sixty workers. `Template` starts the process as
`python -X faulthandler -m tests.invariant.template`: it reads one JSON order per line, replies with the
process id, and writes the exit code to a file when the worker has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tests.support import load

ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    "deepspeed", "transformers.models.llama.modeling_llama", "peft", "orchestrator.model.build",
    "orchestrator.model.adapters", "orchestrator.parallel.ulysses", "orchestrator.train.loop",
)  # fmt: skip
_SECONDS = 0.02  # polling interval for ended processes


@dataclass(frozen=True)
class Forked:
    """A process forked from a template, with the subset of Popen's methods that groups use."""

    pid: int
    exit_file: Path

    def poll(self) -> int | None:
        """Return the exit code, negative if a signal ended the process, or None while it runs."""
        return int(self.exit_file.read_text()) if self.exit_file.exists() else None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60.0) -> int:
        """Wait until the process ends, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: The process still runs after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_SECONDS)
        return code


class Template:
    """A handle of the template process, which is killed when this process exits."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.invariant.template"],
            cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self._process.kill)

    def fork(self, module: str, argument: str, environment: Mapping[str, str], log: Path) -> Forked:
        """Run a module in a forked process, equivalent to `python -m MODULE ARGUMENT > LOG 2>&1`."""
        exit_file = log.with_suffix(".exit")
        order = {
            "module": module,
            "argument": argument,
            "environment": dict(environment),
            "log": str(log),
            "exit_file": str(exit_file),
            "niceness": load.niceness(),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), exit_file)


def _become(order: dict[str, Any]) -> NoReturn:
    """Turn the forked process into the ordered one: redirect output, set the environment, run the module."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        name = order["log"] if number else os.devnull
        os.dup2(os.open(name, flags | os.O_CREAT, 0o644), number)
    os.dup2(1, 2)
    os.nice(order["niceness"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["module"], order["argument"]]
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reap(children: dict[int, Path]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        draft = children[pid].with_suffix(".draft")
        draft.write_text(str(os.waitstatus_to_exitcode(status)))
        draft.rename(children.pop(pid))


def main() -> None:
    """Import the modules, then fork one process per order until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print to stdout, which is reserved for replies
    for name in _IMPORTED:
        import_module(name)
    children: dict[int, Path] = {}
    while True:
        # The next order comes only after the reply to the previous one, so stdin's buffer is empty here and
        # select() sees every line.
        if select.select([sys.stdin], [], [], _SECONDS if children else None)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            order = json.loads(line)
            if (pid := os.fork()) == 0:
                _become(order)
            children[pid] = Path(order["exit_file"])
            answers.write(f"{pid}\n")
            answers.flush()
        _reap(children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
