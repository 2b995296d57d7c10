"""Writing to standard output and error, which may be closed, full, of another encoding, or read by nobody."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from orchestrator.errors import ClusterError


def prepare_streams() -> None:
    """Let both streams take any character, and exist where the caller closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with the descriptor closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open as long as we run
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_result(text: str) -> None:
    """Write a command's result to standard output.

    A reader that has gone, as `head` does, is no error.

    Raises:
        ClusterError: Standard output cannot be written, such as a file on a full disk.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise ClusterError(
            f"the result cannot be written to standard output ({error.strerror}); redirect it elsewhere"
        ) from None


def write_message(text: str) -> None:
    """Write a message to standard error; one that cannot be written is lost, and ends nothing."""
    TolerantStream(sys.stderr).write(text + "\n")


class TolerantStream:
    """A stream whose failures end nothing: a run must outlive the terminal that watches it.

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a text and flush it, or lose it."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            _discard(self._stream)

    def flush(self) -> None:
        """Do nothing: every write flushes."""


def describe_unexpected(error: Exception) -> str:
    """Keep the traceback of an error that nobody foresaw in a file, and return one sentence that names it."""
    reason = " ".join(str(error).split())[:300]
    found = f"unexpected error: {type(error).__name__}: {reason}".removesuffix(": ")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="orchestrator-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{found} at {last.filename}:{last.lineno}; this is a fault of orchestrator, please report it"
    return f"{found}; this is a fault of orchestrator, please report it with the traceback in {file.name}"


@contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """Send to stderr what libraries print meanwhile, also from C++; yield the stdout of results."""
    real = sys.stdout
    try:
        real.flush()
        saved = os.dup(real.fileno())
    except (OSError, ValueError):  # it is no file, as in tests, or closed
        with redirect_stdout(sys.stderr):
            yield real
        return
    os.dup2(2, real.fileno())
    try:
        with os.fdopen(saved, "w", encoding=real.encoding, closefd=False) as out, redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(saved, real.fileno())
        os.close(saved)


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to nowhere: the interpreter flushes the stream once more at its end."""
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except (OSError, ValueError):
        return
