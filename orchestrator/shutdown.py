"""SIGTERM and SIGHUP: how Slurm, Kubernetes, systemd and `ray job stop` ask a command to end.

A thread waits for these signals and all other threads block them. Handlers would not do: `ray.init` installs
one of its own in C++ that prints a stack trace and aborts, and Python runs its handlers between bytecodes
only. The thread interrupts the main thread, or sets an event where the main thread has asked for that, and
ends the process itself where the main thread does not end in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NoReturn

EXIT_CODE = 128 + signal.SIGTERM
_INTERRUPT = signal.SIGRTMIN + 7  # to the main thread; no library here uses it, and nobody else sends it
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_TO_UNWIND = 15.0  # Ray takes about two to end its processes
_SECONDS_OF_ONE_SIGNAL = 0.5  # `timeout` and service managers may send it to the process and to its group


class Stopped(KeyboardInterrupt):
    """The process was asked to end; the message says what was done.

    A KeyboardInterrupt, because `ray.get` lets no other exception of a signal handler through.
    """


class _Listener:
    """The thread that waits for signals, and what it is to do with one."""

    def __init__(self) -> None:
        self.signals: set[int] = set()
        self.received: str | None = None
        self.received_at = 0.0
        self.hint = ""
        self.mode: Literal["exit", "interrupt", "event"] = "exit"
        self.event = threading.Event()
        self.patience = _SECONDS_TO_UNWIND

    def start(self) -> None:
        self.signals = {signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            self.signals.add(signal.SIGHUP)
        signal.signal(_INTERRUPT, self._interrupt)
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)  # threads that are started later inherit it
        # So do processes; those of Ray are forked by Python, which calls this in them.
        os.register_at_fork(after_in_child=self._unblock)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        self._take(signal.sigwait(self.signals))
        while True:
            left = self.received_at + self.patience - time.monotonic()
            again = signal.sigtimedwait(self.signals, max(0.0, left))
            if again is None:
                if time.monotonic() < self.received_at + self.patience:
                    continue  # the main thread has asked for more time
                _end_at_once(f"stopped by {self.received}, and ended what did not end by itself: {self.hint}")
            if time.monotonic() - self.received_at > _SECONDS_OF_ONE_SIGNAL:
                _end_at_once(f"stopped by a second signal, at once: {self.hint}")

    def _take(self, number: int) -> None:
        self.received_at = time.monotonic()
        self.received = signal.Signals(number).name
        _adopt_orphans()
        if self.mode == "exit":
            _end_at_once(f"stopped by {self.received}: {self.hint or 'nothing was begun'}")
        self.event.set()
        if self.mode == "interrupt":
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.mode == "interrupt":
            raise Stopped

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)


_listener: _Listener | None = None


def install() -> None:
    """Wait for SIGTERM, and for SIGHUP unless it is ignored (nohup), from now on.

    To be called in the main thread, before any library has started threads of its own.
    """
    global _listener
    if _listener is None:
        _listener = _Listener()
        _listener.start()


def received() -> str | None:
    """Return the name of the signal that asked this process to end, if one did."""
    return _listener.received if _listener else None


def seconds_since() -> float:
    """Return the seconds since that signal."""
    return time.monotonic() - _listener.received_at if _listener and _listener.received else 0.0


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Have a signal raise `Stopped` in the main thread, wherever it is; outside of this it ends the process.

    Args:
        hint: What the user is told to do, where the main thread cannot say more.
    """
    if _listener is None:
        yield
        return
    _listener.hint, _listener.mode = hint, "interrupt"
    try:
        yield
    finally:
        _listener.mode = "exit"


@contextmanager
def deferred(grace_seconds: float) -> Iterator[threading.Event]:
    """Have a signal set an event instead.

    Args:
        grace_seconds: How long after the signal the caller may go on; some seconds later it is ended.
    """
    if _listener is None:
        yield threading.Event()
        return
    _listener.mode, _listener.patience = "event", grace_seconds + _SECONDS_TO_UNWIND
    try:
        yield _listener.event
    finally:
        # A first signal that comes after this interrupts; one that came before was the caller's to see to.
        _listener.mode = "interrupt"


def leave() -> NoReturn:
    """End with exit code 143, and kill what is left of all that this process has started.

    Without the interpreter's own end: libraries that were broken off in the middle may crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    for pid in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(EXIT_CODE)


def _end_at_once(text: str) -> NoReturn:
    with suppress(OSError):  # nobody reads any more
        os.write(2, f"{text}\n".encode())
    leave()


def _adopt_orphans() -> None:
    """Become the parent of processes below this one whose parent ends first, so that they are found."""
    import ctypes  # not at the top: every command would pay for it

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants(ancestor: int) -> list[int]:
    """Return the processes below one, from Linux's /proc; a process comes before those that it started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(folder.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]
