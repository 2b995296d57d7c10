"""Atomic writes of files, and reads that tolerate files truncated by a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object whose fields its writer documents."""


def read_value(path: Path) -> Any:
    """Return the JSON value of a file; None if the file is missing or not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> JsonObject | None:
    """Return the JSON object of a file; None if it is missing, invalid or not an object."""
    value = read_value(path)
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> list[JsonObject]:
    """Return the objects of a JSON-lines file; truncated lines and values that are not objects are skipped.

    Raises:
        OSError: The file exists but cannot be read.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_text(path: Path, text: str, draft_suffix: str = "draft", fsync: bool = False) -> None:
    """Write a file atomically: readers see the old or the new content, also after a crash.

    Args:
        path: File to replace.
        text: Its new content.
        draft_suffix: Suffix of the temporary file; concurrent writers of the same path need different ones.
        fsync: Flush to disk before the rename, so that the content survives a power failure.

    Raises:
        OSError: The file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{draft_suffix}")
    draft.write_text(text, encoding="utf-8")
    if fsync:
        with draft.open("rb") as file:
            os.fsync(file.fileno())
    draft.replace(path)


def write_json(path: Path, value: object, draft_suffix: str = "draft", fsync: bool = False) -> None:
    """Write a value as JSON atomically; arguments as for `write_text`.

    Raises:
        OSError: The file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n", draft_suffix, fsync)
