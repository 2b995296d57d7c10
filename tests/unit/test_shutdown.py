"""SIGTERM and SIGHUP end a process in one line with code 143, whatever handlers libraries install."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, wait_until

pytestmark = pytest.mark.process

_START = (
    "import signal, subprocess, sys, time, threading\nfrom orchestrator import shutdown\nshutdown.install()\n"
)
_READY = "print('ready', flush=True)\n"


def _heed_signals() -> None:
    """Undo that signals are ignored, as a shell makes it for what runs in the background or with nohup."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def started(body: str, **options: object) -> subprocess.Popen[str]:
    """Start a process and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", _START + body],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"preexec_fn": _heed_signals, **options},  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_main_thread_and_is_not_left_to_other_handlers(number: int) -> None:
    body = f"""
signal.signal({number}, lambda *_: print("not this one", flush=True))  # as ray.init does
try:
    with shutdown.interruptible("do it again"):
        {_READY}        time.sleep(60)
except KeyboardInterrupt as error:
    print(type(error).__name__, shutdown.received(), flush=True)
    sys.exit(shutdown.EXIT_CODE)
"""
    process = started(body)
    process.send_signal(number)
    assert ended(process) == (143, f"Stopped {signal.Signals(number).name}\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_destructor_is_not_lost(number: int) -> None:
    """Exceptions in a destructor are ignored, that of the signal too."""
    body = f"""
class Slow:
    def __del__(self):
        {_READY}        time.sleep(60)
try:
    with shutdown.interruptible("do it again"):
        slow = Slow()
        del slow
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", shutdown.received(), flush=True)
    sys.exit(shutdown.EXIT_CODE)
"""
    process = started(body)
    sent = time.monotonic()
    process.send_signal(number)
    name = "SIGTERM" if number == signal.SIGTERM else None
    assert ended(process) == (143, f"interrupted {name}\n", "")
    assert time.monotonic() - sent < 30


def test_other_exceptions_of_a_destructor_are_printed() -> None:
    body = f"""
class Wrong:
    def __del__(self):
        raise ValueError("in vain")
with shutdown.interruptible("again"):
    {_READY}    wrong = Wrong()
    del wrong
"""
    code, _, said = ended(started(body))
    assert code == 0
    assert "ValueError: in vain" in said


def test_where_nothing_has_begun_one_line_is_all() -> None:
    process = started(f"{_READY}time.sleep(60)")
    process.terminate()
    assert ended(process) == (143, "", "stopped by SIGTERM: nothing was started\n")


def test_what_is_deferred_is_seen_by_the_caller() -> None:
    body = f"""
with shutdown.interruptible("again"):
    with shutdown.deferred(30.0) as told:
        {_READY}        assert told.wait(60)
        print(shutdown.received(), shutdown.seconds_since() < 30, flush=True)
"""
    process = started(body)
    process.terminate()
    assert ended(process)[:2] == (0, "SIGTERM True\n")


def test_a_second_signal_ends_the_process_and_all_below_it_at_once() -> None:
    body = f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with shutdown.interruptible("again"), shutdown.deferred(600.0) as told:
    print(child.pid, file=sys.stderr, flush=True)
    {_READY}    told.wait()
    print("told", flush=True)
    time.sleep(600)
"""
    process = started(body)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "told\n"
    time.sleep(0.7)  # what comes sooner counts as the same signal
    process.terminate()
    code, _, err = ended(process)
    child, line = err.splitlines()
    assert (code, line) == (143, "stopped immediately by a second signal: again")
    wait_until(lambda: _state(int(child)) == "Z", 30, "the child is killed")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"  # and reaped


def test_a_signal_sent_to_process_and_group_at_once_counts_as_one() -> None:
    body = f"""
with shutdown.interruptible("again"), shutdown.deferred(30.0) as told:
    {_READY}    told.wait()
    time.sleep(1.0)
    print("in peace", flush=True)
"""
    process = started(body)
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    assert ended(process)[:2] == (0, "in peace\n")


def test_a_main_thread_that_does_not_end_is_ended() -> None:
    body = f"""
shutdown._SECONDS_TO_UNWIND = shutdown._listener.patience = 0.5
ready = False
with shutdown.interruptible("again"):
    while True:
        try:
            if not ready:
                ready = True
                {_READY}            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
    process = started(body)
    process.terminate()
    assert ended(process)[::2] == (
        143,
        "stopped by SIGTERM, and killed after the grace period: again\n",
    )


def test_under_nohup_sighup_goes_unheard() -> None:
    body = f"{_READY}time.sleep(1)\nprint('still here', flush=True)"
    process = started(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, "still here\n", "")


def test_processes_that_python_forks_can_be_ended_as_ever() -> None:
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=lambda: None)
child.terminate()
print("ready", child.wait() == -signal.SIGTERM, flush=True)
"""
    process = subprocess.run(
        [sys.executable, "-c", _START + body],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout == "ready True\n"


def test_without_install_nothing_changes() -> None:
    body = (
        "from orchestrator import shutdown\n"
        "with shutdown.interruptible('x'), shutdown.deferred(1.0) as told: print(told)"
    )
    done = subprocess.run(
        [sys.executable, "-c", body],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "unset" in done.stdout


def test_what_outlives_its_parent_is_ended_too() -> None:
    code = "import subprocess, sys, time; sleeper = [sys.executable, '-c', 'import time; time.sleep(600)']; "
    code += "print(subprocess.Popen(sleeper).pid, flush=True); time.sleep(600)"
    body = f"""
middle = subprocess.Popen([sys.executable, "-c", {code!r}], stdout=subprocess.PIPE, text=True)
child = int(middle.stdout.readline())
try:
    with shutdown.interruptible("again"):
        {_READY}        time.sleep(60)
except KeyboardInterrupt:
    middle.kill()
    middle.wait()
    print(child, flush=True)
    shutdown.leave()
"""
    process = started(body)
    process.terminate()
    ended_with, out, _ = ended(process)
    assert ended_with == 143
    wait_until(lambda: _state(int(out)) == "Z", 30, "the orphan is killed")
