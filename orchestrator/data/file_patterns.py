"""Finds files by a pattern: `*`, `?` and `[...]` match within a folder, `**` matches any folders."""

from __future__ import annotations

import glob
import re
from pathlib import Path

_WILDCARD = re.compile(r"[*?\[]")


def has_wildcards(path: str) -> bool:
    """Return whether a path is a pattern."""
    return _WILDCARD.search(path) is not None


def base_of(pattern: str) -> str:
    """Return the folder of a pattern up to its first wildcard, with a slash at its end, or an empty text."""
    match = _WILDCARD.search(pattern)
    return pattern[: pattern.rfind("/", 0, match.start()) + 1] if match else pattern


def matching(pattern: str) -> list[str]:
    """Return the paths of the files on disk that match a pattern, sorted; hidden ones do not."""
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())


def matches(name: str, pattern: str) -> bool:
    """Return whether a relative path matches a relative pattern."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    signs = {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = "".join(
        signs[part] if part in signs else part.replace("[!", "[^", 1) if _is_set(part) else re.escape(part)
        for part in parts
    )
    return re.fullmatch(text, name) is not None


def _is_set(part: str) -> bool:
    return part.startswith("[") and part.endswith("]") and len(part) > 2
