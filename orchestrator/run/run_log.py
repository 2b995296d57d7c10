"""Log files of a run: STORAGE/NAME/logs/driver.log, and rank-N.attempt-A.log for each worker of an attempt.

A later start appends to the files. A rank's log captures stdout and stderr of the process at the level of
file descriptors, so it includes output of NCCL, DeepSpeed's C++ code and stack traces. The values of
environment variables that look like secrets are redacted in what the logging module writes.
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
_MAX_BYTES = 16 * 2**20
_KEPT_BYTES = 2**20
_MAX_ATTEMPTS = 10
_TRIM_INTERVAL_SECONDS = 30.0
_INFO_LOGGERS = ("orchestrator",)  # other loggers write warnings and errors only
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_MIN_SECRET_LENGTH = 6
_RANK_LOG = re.compile(r"rank-\d+\.attempt-(\d+)\.log")


@contextmanager
def driver_log(run_dir: Path) -> Iterator[Path]:
    """Append the log records of this process to the run's driver.log, and how the run ended.

    Args:
        run_dir: The run directory. If it is not writable, the run continues without a log file.

    Yields:
        The log file.
    """
    path = run_dir / LOGS / DRIVER_LOG
    try:
        path.parent.mkdir(exist_ok=True)
        handler: logging.Handler = RotatingFileHandler(
            path, maxBytes=_MAX_BYTES, backupCount=1, encoding="utf-8"
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
def rank_log(run_dir: Path, rank: int, attempt: int) -> Iterator[Path]:
    """Redirect stdout and stderr of this process to the log of its rank, and append its log records.

    Args:
        run_dir: The run directory.
        rank: Rank of this worker.
        attempt: Number of the current attempt.

    Yields:
        The log file.
    """
    path = run_dir / LOGS / f"rank-{rank}.attempt-{attempt}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:  # a run does not fail for want of a log
        yield path
        return
    saved = _redirect(file)
    ended = threading.Event()
    threading.Thread(target=_trim_periodically, args=(path, ended), daemon=True).start()
    try:
        stream = os.fdopen(os.dup(file), "a", encoding="utf-8")
        with _without_console_handlers(), _attached(logging.StreamHandler(stream)):
            yield path
    finally:
        ended.set()
        _restore(saved)
        os.close(file)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text in which the value of each secret environment variable is replaced by its name."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET_LENGTH and value in text:
            text = text.replace(value, f"[{name}]")
    return text


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _is_worth_keeping(record: logging.LogRecord) -> bool:
    """Return whether a record is ours, or at least a warning: Ray and DeepSpeed log much at INFO."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in _INFO_LOGGERS


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Attach a handler to the root logger, and lower our own loggers to INFO."""
    handler.setFormatter(_Formatter(_FORMAT))
    handler.addFilter(_is_worth_keeping)
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in _INFO_LOGGERS]
    levels = [logger.level for logger in loggers]
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_console_handlers() -> Iterator[None]:
    """Remove Ray's stderr handlers from the root logger: with stderr redirected they would double lines."""
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
    """Point file descriptors 1 and 2 to a file; return duplicates of the old ones."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return saved


def _restore(saved: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, duplicate in zip((1, 2), saved, strict=True):
        os.dup2(duplicate, descriptor)
        os.close(duplicate)


def _trim_periodically(path: Path, ended: threading.Event) -> None:
    """Trim a log every _TRIM_INTERVAL_SECONDS until the attempt ends."""
    while not ended.wait(_TRIM_INTERVAL_SECONDS):
        trim_log(path)


def trim_log(path: Path, max_bytes: int = _MAX_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
    """Drop all but the end of a log that is too large, in place: writers keep appending to the same file.

    Args:
        path: The log file.
        max_bytes: Size above which it is trimmed.
        kept_bytes: Size of the end that is kept.
    """
    try:
        size = path.stat().st_size
        if size <= max_bytes:
            return
        with path.open("rb") as file:
            file.seek(size - kept_bytes)
            end = file.read().partition(b"\n")[2]
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(b"(older lines were dropped: the log had %d bytes)\n" % size + end)
    except OSError:
        return


def _remove_old_rank_logs(logs: Path) -> None:
    """Remove rank logs of all but the newest attempts."""
    try:
        attempts = {
            file: int(match[1]) for file in logs.iterdir() if (match := _RANK_LOG.fullmatch(file.name))
        }
        for file, attempt in attempts.items():
            if attempt <= max(attempts.values()) - _MAX_ATTEMPTS:
                file.unlink(missing_ok=True)
    except OSError:
        return
