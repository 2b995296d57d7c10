"""The JSON and JSON-lines files of runs and sweeps: written whole, and read as a crash left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_value(path: Path) -> Any:
    """Return the JSON value of a file; None where the file is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None where it is missing, unreadable or another value."""
    found = read_value(path)
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; lines that are cut short or hold another value are skipped.

    Raises:
        OSError: The file is there and cannot be read.
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


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: whoever is killed meanwhile leaves what was there before.

    Raises:
        OSError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(path, json.dumps(value, indent=2) + "\n")
