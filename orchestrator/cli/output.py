"""Writes to stdout and stderr, which may be closed, full or have another encoding."""

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
    """Make both streams accept any character, and replace closed ones."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the file descriptor was closed at start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process exits
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_result(text: str) -> None:
    """Write a command's result to stdout.

    A closed pipe, as with `head`, is not an error.

    Raises:
        ClusterError: Stdout cannot be written, for example to a full disk.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise ClusterError(
            f"cannot write the result to stdout ({error.strerror}); redirect it elsewhere"
        ) from None


def write_message(text: str) -> None:
    """Write a message to stderr; ignore errors."""
    TolerantStream(sys.stderr).write(text + "\n")


class TolerantStream:
    """A text stream that ignores write errors, so that a run survives its terminal.

    Args:
        stream: Stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write and flush; discard the text on errors."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            _discard(self._stream)

    def flush(self) -> None:
        """Do nothing: every write flushes."""


def describe_unexpected(error: Exception) -> str:
    """Write the traceback of an unexpected error to a file, and return a one-line message."""
    reason = " ".join(str(error).split())[:300]
    message = f"unexpected error: {type(error).__name__}: {reason}".removesuffix(": ")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="orchestrator-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{message} at {last.filename}:{last.lineno}; this is a bug in orchestrator, please report it"
    return f"{message}; this is a bug in orchestrator, please report it with the traceback in {file.name}"


@contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """Redirect stdout of libraries, including C++, to stderr; yield the original stdout."""
    real = sys.stdout
    try:
        real.flush()
        saved = os.dup(real.fileno())
    except (OSError, ValueError):  # not a file, as in tests, or closed
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
    """Redirect a stream to /dev/null, because the interpreter flushes its buffer again at exit."""
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except (OSError, ValueError):
        return
