"""Parts of a split, such as `train[:1000]` or `train[10%:20%]`, as `datasets` defines them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import SpecError

_SPLIT = re.compile(r"(?P<name>[^\[]+)(\[(?P<start>[^:]*):(?P<stop>[^\]]*)\])?")


@dataclass(frozen=True)
class SplitSlice:
    """A range of rows of a split.

    Attributes:
        start: First row: a number, negative from the end, or a percentage; empty for the start.
        stop: The row after the last, likewise; empty for the end.
    """

    start: str
    stop: str

    @property
    def needs_count(self) -> bool:
        """Whether the range depends on the number of rows."""
        return any(bound.startswith("-") or bound.endswith("%") for bound in (self.start, self.stop))

    def rows(self, count: int) -> tuple[int, int]:
        """Return the first row, from 0, and the row after the last.

        Args:
            count: Rows of the split; if the range does not depend on it, any number above the range.
        """
        first, stop = _row(self.start or "0", count), _row(self.stop or str(count), count)
        return first, max(first, stop)


def split_of(split: str | None) -> tuple[str | None, SplitSlice | None]:
    """Return the name of a split and the part of it to read, for `SourceSpec.split`."""
    match = _SPLIT.fullmatch(split) if split else None
    if match is None or match["start"] is None:
        return split, None
    return match["name"], SplitSlice(match["start"], match["stop"])


def no_rows(path: str, split: str, count: int) -> SpecError:
    """Return the error for a slice without rows."""
    return SpecError(f"data {path} has {count} rows, and split={split} selects none of them; widen it")


def _row(bound: str, count: int) -> int:
    """Return the row of a bound; percentages are rounded to the nearest row."""
    row = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(row + count if row < 0 else row, 0), count)
