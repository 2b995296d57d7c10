"""Graceful shutdown on SIGTERM and SIGHUP, which Slurm, Kubernetes, systemd and `ray job stop` send.

A thread waits for these signals and all other threads block them. Signal handlers are not sufficient:
`ray.init` replaces them by one in C++ that prints a stack trace and aborts, and Python runs its handlers only
between bytecodes. The thread interrupts the main thread, or sets an event if the main thread uses `deferred`,
and terminates the process if the main thread does not end in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_CODE = 128 + signal.SIGTERM
_INTERRUPT = signal.SIGRTMIN + 7  # from the thread to the main thread; no library uses this signal
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_TO_UNWIND = 15.0  # Ray takes about 2 s to end its processes
_SECONDS_OF_A_DESTRUCTOR = 0.1
_SECONDS_OF_ONE_SIGNAL = 0.5  # `timeout` and service managers may signal both the process and its group


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received; the message says what was done.

    A KeyboardInterrupt, because `ray.get` propagates no other exception of a signal handler.
    """


class _Listener:
    """The thread that waits for signals, and its current mode."""

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
        sys.unraisablehook = partial(self._interrupt_again, sys.unraisablehook)
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)  # inherited by threads that start later
        # Child processes inherit the mask too; Ray forks its processes from Python, which unblocks them here.
        os.register_at_fork(after_in_child=self._unblock)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        self._take(signal.sigwait(self.signals))
        while True:
            left = self.received_at + self.patience - time.monotonic()
            again = signal.sigtimedwait(self.signals, max(0.0, left))
            if again is None:
                if time.monotonic() < self.received_at + self.patience:
                    continue  # the main thread extended `patience`
                _terminate(f"stopped by {self.received}, and killed after the grace period: {self.hint}")
            if time.monotonic() - self.received_at > _SECONDS_OF_ONE_SIGNAL:
                _terminate(f"stopped immediately by a second signal: {self.hint}")

    def _take(self, number: int) -> None:
        self.received_at = time.monotonic()
        self.received = signal.Signals(number).name
        _become_subreaper()
        if self.mode == "exit":
            _terminate(f"stopped by {self.received}: {self.hint or 'nothing was started'}")
        self.event.set()
        if self.mode == "interrupt":
            _send_to_main_thread(_INTERRUPT)

    def _interrupt_again(
        self, otherwise: Callable[[UnraisableHookArgs], object], ignored: UnraisableHookArgs
    ) -> None:
        """Interrupt the main thread once more if it ran a destructor, where exceptions are ignored."""
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            otherwise(ignored)
            return
        number = _INTERRUPT if isinstance(ignored.exc_value, Stopped) else signal.SIGINT
        timer = threading.Timer(_SECONDS_OF_A_DESTRUCTOR, _send_to_main_thread, [number])
        timer.daemon = True
        timer.start()

    def _interrupt(self, number: int, frame: object) -> None:
        if self.mode == "interrupt":
            raise Stopped

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)


_listener: _Listener | None = None


def install() -> None:
    """Start the thread that waits for SIGTERM, and for SIGHUP unless it is ignored (nohup).

    Call it in the main thread before any library starts threads, which inherit the signal mask.
    """
    global _listener
    if _listener is None:
        _listener = _Listener()
        _listener.start()


def received() -> str | None:
    """Return the name of the received signal, or None."""
    return _listener.received if _listener else None


def seconds_since() -> float:
    """Return the seconds since the signal, 0 if there was none."""
    return time.monotonic() - _listener.received_at if _listener and _listener.received else 0.0


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Raise `Stopped` in the main thread on a signal; outside of this context a signal ends the process.

    Args:
        hint: Remedy in the message if the main thread cannot report one.
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
    """Set an event on a signal instead of raising `Stopped`.

    Args:
        grace_seconds: Time after the signal for the caller to finish; 15 s later the process is terminated.
    """
    if _listener is None:
        yield threading.Event()
        return
    _listener.mode, _listener.patience = "event", grace_seconds + _SECONDS_TO_UNWIND
    try:
        yield _listener.event
    finally:
        # A first signal after this point raises `Stopped`; one before it was handled by the caller.
        _listener.mode = "interrupt"


def _send_to_main_thread(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def leave() -> NoReturn:
    """Kill all descendants and exit with code 143.

    Interpreter shutdown is skipped, because interrupted libraries may crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    for pid in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(EXIT_CODE)


def _terminate(text: str) -> NoReturn:
    with suppress(OSError):  # stderr is closed
        os.write(2, f"{text}\n".encode())
    leave()


def _become_subreaper() -> None:
    """Become the parent of orphaned descendants, so that `_descendants` finds them."""
    import ctypes  # slow to import, and rarely used

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants(ancestor: int) -> list[int]:
    """Return the PIDs of all descendants from /proc; parents come before children."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # the process has ended
        children.setdefault(parent, []).append(int(folder.name))
    pids = [ancestor]
    for pid in pids:
        pids += children.get(pid, [])
    return pids[1:]
