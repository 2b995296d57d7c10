"""Send SIGTERM at random moments of a run, restart it each time, and finally train it to its end.

    python -m tests.chaos.sigterm --times 20 --seed 0

prints a line for each signal, and exits with 1 if any was not handled correctly.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import finish, job_text, losses, orchestrator, processes_of, start, step_rows, wait_until

GRACE_SECONDS = 20.0
_MANY_STEPS = 100_000
_SECONDS_OF_TRAINING = 10.0
_TOLERANCE = 1e-6
_EXIT_TIMEOUT_SECONDS = 30.0
_NOISE = ("Traceback", "***", "SIGABRT", "SIGTERM received", "Exception ignored")


@dataclass
class Answer:
    """How a command handled a signal.

    Attributes:
        code: Exit code.
        seconds: Time from the signal to the exit.
        said: Last line on stderr.
        shown: Last line on stdout, which names the phase.
        problems: What is wrong with the above.
    """

    code: int
    seconds: float
    said: str
    shown: str
    problems: list[str]


def interrupt(process: subprocess.Popen[str], marker: str, number: int = signal.SIGTERM) -> Answer:
    """Send a signal to a run, wait for its exit, and check messages and remaining processes."""
    sent = time.monotonic()
    process.send_signal(number)
    done = finish(process, timeout=120)
    seconds = time.monotonic() - sent
    lines = done.err.strip().splitlines() or [""]
    problems = [f"{word!r} on stderr" for word in _NOISE if word in done.err]
    if done.code != 128 + signal.SIGTERM:
        problems.append(f"exit code {done.code}")
    if not lines[-1].startswith(f"stopped by {signal.Signals(number).name}"):
        problems.append(f"last line on stderr: {lines[-1]!r}")
    if seconds > GRACE_SECONDS:
        problems.append(f"took {seconds:.1f} s")
    deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left := processes_of(marker):
        problems.append(f"{len(left)} processes left")
    shown = (done.out.strip().splitlines() or ["(nothing yet)"])[-1]
    return Answer(done.code, seconds, lines[-1], shown, problems)


def begin(*arguments: str, cwd: Path, marker: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command, and wait until it handles signals.

    Before that, while Python starts, a signal kills it without a message.
    """
    name, _, value = marker.partition("=")
    process = start(*arguments, cwd=cwd, **{name: value}, **environment)
    wait_until(lambda: _listens(process), 60, "the command handles signals")
    return process


def _listens(process: subprocess.Popen[str]) -> bool:
    """Return whether a process blocks SIGTERM: all threads do except the one that waits for signals."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    (blocked,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")]
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def _lost(run: Path) -> int:
    """Return the number of repeated steps."""
    rows = [int(row["step"]) for row in step_rows(run)]
    return len(rows) - len(set(rows))


def _write_job(folder: Path, workers: int) -> None:
    """Write a job whose losses do not depend on its number of steps."""
    folder.mkdir()
    text = job_text(
        folder / "runs",
        optim__max_steps=_MANY_STEPS,
        optim__lr_scheduler="constant",
        optim__warmup_ratio=0.0,
        data__max_length=256,
        parallel={"workers": workers, "zero_stage": 2},
        eval__every_steps=20,
    )
    (folder / "job.yaml").write_text(text)


def _seconds_to_train(folder: Path) -> float:
    """Start a run, wait for its first steps, stop it, and return how long they took."""
    began = time.monotonic()
    process = start("train", "job.yaml", cwd=folder)
    wait_until(lambda: len(step_rows(folder / "runs" / "run")) >= 2, 600, "two steps")
    took = time.monotonic() - began
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 143
    return took


def _signal_once(folder: Path, moment: float, number: int) -> int:
    """Start the run, send a signal after some time, print the result; return the number of problems."""
    run, marker = folder / "runs" / "run", f"TEST_MARKER={uuid.uuid4().hex}"
    lost = _lost(run)
    process = begin("train", "job.yaml", cwd=folder, marker=marker)
    time.sleep(moment)
    answer = interrupt(process, marker)
    lost = _lost(run) - lost
    if lost > 1:
        answer.problems.append(f"{lost} steps repeated")
    _print(
        f"{number:2d}: after {moment:5.1f} s, exit {answer.code} in {answer.seconds:4.1f} s, {lost} steps "
        f"lost, {'; '.join(answer.problems) or 'no problems'}\n      {answer.shown[:100]}\n"
        f"      {answer.said}"
    )
    return len(answer.problems)


def main() -> int:
    """Send the signals; return 1 if any was not handled correctly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    dice, folder = random.Random(options.seed), Path(tempfile.mkdtemp())
    stopped, whole = folder / "stopped", folder / "whole"

    for directory in (stopped, whole):
        _write_job(directory, options.workers)
    span = _seconds_to_train(stopped) + _SECONDS_OF_TRAINING
    _print(f"signals are sent within {span:.0f} s of each start")
    bad = sum(
        _signal_once(stopped, dice.uniform(0.0, span), number) for number in range(1, options.times + 1)
    )
    run = stopped / "runs" / "run"
    to_the_end = ("--set", f"optim.max_steps={max(losses(run), default=0) + 1}")

    for directory in (stopped, whole):
        done = orchestrator("train", "job.yaml", *to_the_end, cwd=directory, timeout=1200)
        assert done.code == 0, done.err
    expected, actual = losses(whole / "runs" / "run"), losses(run)
    largest = max(abs(actual[step] - loss) / loss for step, loss in expected.items())
    _print(
        f"{len(actual)} steps, {_lost(run)} of them repeated, losses within {largest:.1e} of an "
        f"uninterrupted run; {bad} problems"
    )
    return int(bool(bad) or largest > _TOLERANCE)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
