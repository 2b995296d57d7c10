"""A run's logs: STORAGE/NAME/logs/driver.log, and rank-N.attempt-A.log for each worker of an attempt.

All are appended to, so that a run that is started again keeps what was written before. A rank's log holds
all that its process writes to stdout and stderr, whoever writes it: Python, DeepSpeed, NCCL or a C++ stack
trace. Values of environment variables that look like secrets are replaced where the logging module writes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from orchestrator import shutdown
from orchestrator.errors import OrchestratorError

_logger = logging.getLogger(__name__)
LOGS = "logs"
DRIVER_LOG = "driver.log"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LARGEST_BYTES = 16 * 2**20
_KEPT_BYTES = 2**20
_ATTEMPTS_KEPT = 10
_SECONDS_BETWEEN_LOOKS = 30.0
_OURS = ("orchestrator",)  # loggers whose INFO is written; of others, warnings
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 6
_RANK_LOG = re.compile(r"rank-\d+\.attempt-(\d+)\.log")


@contextmanager
def driver_log(home: Path) -> Iterator[Path]:
    """Append all that is logged in this process to the run's driver.log, and how it ended.

    Args:
        home: The run's folder; where logs cannot be written in it, the run goes on without.

    Yields:
        The file.
    """
    path = home / LOGS / DRIVER_LOG
    try:
        path.parent.mkdir(exist_ok=True)
        handler: logging.Handler = RotatingFileHandler(
            path, maxBytes=_LARGEST_BYTES, backupCount=1, encoding="utf-8"
        )
    except OSError:
        handler = logging.NullHandler()
    _remove_old_rank_logs(path.parent)
    with _attached(handler):
        try:
            yield path
        except OrchestratorError as error:
            _logger.error("%s", error)
            raise
        except KeyboardInterrupt as error:
            _logger.warning("stopped by %s %s", shutdown.received() or "Ctrl-C", error)
            raise
        except Exception:
            _logger.exception("the driver failed")
            raise


@contextmanager
def rank_log(home: Path, rank: int, attempt: int) -> Iterator[Path]:
    """Append all that this process writes to the log of a rank.

    Args:
        home: The run's folder.
        rank: Rank of this worker.
        attempt: Number of the attempt that it is a part of.

    Yields:
        The file.
    """
    path = home / LOGS / f"rank-{rank}.attempt-{attempt}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:  # no reason to end a run
        yield path
        return
    before = _redirect(file)
    ended = threading.Event()
    threading.Thread(target=_keep_small, args=(path, ended), daemon=True).start()
    try:
        stream = os.fdopen(os.dup(file), "a", encoding="utf-8")
        with _no_consoles(), _attached(logging.StreamHandler(stream)):
            yield path
    finally:
        ended.set()
        _restore(before)
        os.close(file)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without the values of environment variables whose names say that they are secret."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value in text:
            text = text.replace(value, f"[{name}]")
    return text


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Have a handler write what any logger is told, and INFO of our own loggers."""
    handler.setFormatter(_Formatter(_FORMAT))
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in _OURS]
    levels = [logger.level for logger in ours]
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_consoles() -> Iterator[None]:
    """Take away what Ray has the root logger write to stderr, which would stand in the file a second time."""
    root = logging.getLogger()
    consoles = [
        handler
        for handler in root.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    for handler in consoles:
        root.removeHandler(handler)
    try:
        yield
    finally:
        for handler in consoles:
            root.addHandler(handler)


def _redirect(file: int) -> tuple[int, int]:
    """Point stdout and stderr of the whole process to a file; return where they pointed."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return before


def _restore(before: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for target, saved in zip((1, 2), before, strict=True):
        os.dup2(saved, target)
        os.close(saved)


def _keep_small(path: Path, ended: threading.Event) -> None:
    """Drop the older part of a log that grows without end, every now and then."""
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        shorten(path)


def shorten(path: Path, largest: int = _LARGEST_BYTES, kept: int = _KEPT_BYTES) -> None:
    """Keep only the end of a log that is larger than it may be; those who append to it go on.

    Args:
        path: The file.
        largest: Bytes that it may have.
        kept: Bytes of its end that stay.
    """
    try:
        size = path.stat().st_size
        if size <= largest:
            return
        with path.open("rb") as file:
            file.seek(size - kept)
            end = file.read().partition(b"\n")[2]
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(b"(older lines were dropped: the log had %d bytes)\n" % size + end)
    except OSError:
        return


def _remove_old_rank_logs(folder: Path) -> None:
    """Keep the ranks' logs of the newest attempts."""
    try:
        found = [
            (int(match[1]), file) for file in folder.iterdir() if (match := _RANK_LOG.fullmatch(file.name))
        ]
        for attempt, file in found:
            if attempt <= max(number for number, _ in found) - _ATTEMPTS_KEPT:
                file.unlink(missing_ok=True)
    except OSError:
        return
