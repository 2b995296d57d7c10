"""Logging to the console: messages of this program, as plain lines, at a level that the user chooses."""

from __future__ import annotations

import logging
import os
from typing import Protocol

LEVEL_VARIABLE = "ORCHESTRATOR_LOG"
LEVELS = ("debug", "info", "warning", "error")
_NAME = "orchestrator"


class Stream(Protocol):
    """What a console handler writes to."""

    def write(self, text: str, /) -> object:
        """Write a text."""

    def flush(self) -> object:
        """Flush what was written."""


class _Formatter(logging.Formatter):
    """INFO as the message alone; other levels with their name, DEBUG with the logger's name as well."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno == logging.INFO:
            return text
        name = f" {record.name}" if record.levelno < logging.INFO else ""
        return f"{record.levelname.lower()}{name}: {text}"


def console_log(stream: Stream, level: str | None = None) -> logging.Handler:
    """Write the messages of this program to a stream, in place of the one of an earlier call.

    Args:
        stream: Where lines go.
        level: One of `LEVELS`; None keeps the level of the earlier call, or takes ORCHESTRATOR_LOG from the
            environment, or info.

    Returns:
        The handler, for a caller that removes it again.

    Raises:
        ValueError: The level is not one of `LEVELS`.
    """
    logger = logging.getLogger(_NAME)
    earlier = [handler for handler in logger.handlers if isinstance(handler.formatter, _Formatter)]
    before = logging.getLevelName(earlier[-1].level) if earlier else os.environ.get(LEVEL_VARIABLE)
    name = (level or before or "info").lower()
    if name not in LEVELS:
        source = "--log-level" if level else LEVEL_VARIABLE
        raise ValueError(f"{source}={name} is not a log level; use {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")
    for handler in earlier:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter())
    handler.setLevel(name.upper())
    logger.addHandler(handler)
    logger.setLevel(min(handler.level, logging.INFO))
    return handler
