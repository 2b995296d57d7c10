"""Finds how the rows of a JSON file are laid out, and iterates over them in bounded memory.

A file is an array of rows, rows of one line each, objects one after another over several lines, or one object
with a list of rows, such as {"version": 1, "data": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from orchestrator.data import turns
from orchestrator.data.columns import Columns, is_row
from orchestrator.data.file_content import require_utf8
from orchestrator.data.json_stream import (
    Entries,
    JsonTextError,
    TextBuffer,
    array_rows,
    broken,
    first_text,
    lines,
)

Read = Callable[[], bytes]
Rows = tuple[Literal["row", "line"], Entries]
_LONGEST_FIRST_LINE = 16 * 2**20  # bytes; rows of a longer first line are not recognized as lists a line
_LINES_TRIED = 20
_SHOWN = 60


def rows(start: Callable[[], Read], field: str | None, columns: Columns) -> Rows:
    """Return an iterator over the rows of a JSON file.

    Args:
        start: Returns a function that reads the file from its start in chunks, empty at its end.
        field: Name of the list in the file's object; None looks for it.
        columns: `SourceSpec.columns`, which tells a row from an object that holds rows.

    Returns:
        `row` and an iterator of parsed values, numbered from 1; or `line` and an iterator of lines as bytes,
        or of parsed objects, numbered by the line on which each begins.

    Raises:
        ContentError: The file is not UTF-8.
        JsonTextError: The file is not JSON, or the list of rows is ambiguous or missing; later, from the
            iterator, for an array that is not valid JSON.
    """
    read = start()
    head, has_more = _head(read)
    require_utf8(head.rpartition(b"\n")[0])
    first = head.lstrip()[:1]
    if first == b"{":
        return _of_objects(start, read, head, has_more, field, columns)
    if field is not None and first:
        raise JsonTextError(f"is not one JSON object, so it has no list {field}; remove field: {field}")
    if first == b"[":
        if _is_lists_a_line(head, has_more, columns):
            return "line", lines(head, read)
        return "row", array_rows(TextBuffer(head, read))
    _require_json_lines(head)
    return "line", lines(head, read)


def is_json_lines(read: Read) -> bool:
    """Return whether the first line of a text file is a JSON object or list."""
    return isinstance(_first_line(first_text(read)), dict | list)


def _head(read: Read) -> tuple[bytes, bool]:
    """Return the start of the file, with its first line if that is not too long, and whether lines follow."""
    head = first_text(read)
    while True:
        _, end, rest = head.lstrip().partition(b"\n")
        if rest.strip():
            return head, True
        if len(head) > _LONGEST_FIRST_LINE and not end:
            return head, False
        if not (more := read()):
            return head, False
        head += more


def _first_line(head: bytes) -> object:
    """Return the parsed first line that is not blank; None if it is not JSON."""
    try:
        value: object = json.loads(head.lstrip().split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return None
    return value


def _is_lists_a_line(head: bytes, has_more: bool, columns: Columns) -> bool:
    value = _first_line(head)
    return isinstance(value, list) and (has_more or turns.are_turns(value, turns.keys_of(columns)))


def _of_objects(
    start: Callable[[], Read], read: Read, head: bytes, has_more: bool, field: str | None, columns: Columns
) -> Rows:
    if field is None and has_more and isinstance(_first_line(head), dict):
        return "line", lines(head, read)
    try:
        scan = _scan(start())
    except JsonTextError:
        if field is None and (not has_more or _is_broken_line(head)):
            return "line", lines(head, read)  # `parse` says which lines are broken
        raise
    if scan.more:
        if field is not None:
            raise JsonTextError(f"has several objects, so it has no list {field}; remove field: {field}")
        is_a_line_each = has_more and scan.lines == 1
        return "line", lines(head, read) if is_a_line_each else _objects(start())
    name = _list_of_rows(scan, field, columns)
    if name is None:
        return "line", lines(head, read) if scan.lines == 1 else _objects(start())
    return "row", _elements(start(), name)


def _is_broken_line(head: bytes) -> bool:
    """Return whether a first line that is not JSON is one of JSON lines, and not the start of an object."""
    first, *others = head.lstrip().split(b"\n")[:_LINES_TRIED]
    if first.rstrip().endswith((b"{", b"[", b",")):
        return False
    return any(line.startswith(b"{") and isinstance(_first_line(line), dict) for line in others)


@dataclass(frozen=True)
class _Scan:
    """The first object of a file.

    Attributes:
        members: Its fields; of a list, the first two elements.
        lists: Names of fields that are lists.
        lines: Lines that it takes.
        more: Whether something follows it.
    """

    members: Mapping[str, object]
    lists: tuple[str, ...]
    lines: int
    more: bool


def _buffer(read: Read) -> TextBuffer:
    return TextBuffer(first_text(read), read)


def _scan(read: Read) -> _Scan:
    """Read the first object of a file without keeping its lists.

    Raises:
        JsonTextError: It is not valid JSON.
    """
    text = _buffer(read)
    members: dict[str, object] = {}
    lists: list[str] = []
    first = None
    for name in _names(text):
        first = text.line if first is None else first
        if text.next_sign() == "[":
            elements = (value for _, value, _ in array_rows(text, to_end=False))
            members[name] = list(islice(elements, 2))
            lists.append(name)
            for _ in elements:
                pass
        else:
            members[name], _ = text.value(f"line {text.line}")
    taken = text.line - (first or text.line) + 1
    return _Scan(members, tuple(lists), taken, bool(text.next_sign()))


def _names(text: TextBuffer) -> Iterator[str]:
    """Yield the names of an object's fields, each with the position before its value; the caller reads it.

    Raises:
        JsonTextError: The object is not valid JSON.
    """
    text.next_sign()
    text.at += 1
    is_first = True
    while (sign := text.next_sign()) != "}" or not is_first:
        where = f"line {text.line}"
        if sign != '"':
            raise broken(
                where, f"{sign!r} where a field in double quotes belongs" if sign else "the text ends here"
            )
        name, _ = text.value(where)
        if text.next_sign() != ":":
            raise broken(f"line {text.line}", f"field {name} without a colon")
        text.at += 1
        yield str(name)
        is_first = False
        sign = text.next_sign()
        if sign == "}":
            break
        if sign != ",":
            raise broken(
                f"line {text.line}", f"{sign!r} where a comma belongs" if sign else "the text ends here"
            )
        text.at += 1
    text.at += 1


def _list_of_rows(scan: _Scan, field: str | None, columns: Columns) -> str | None:
    """Return the name of the list of rows in an object, or None if the object is a row itself.

    Raises:
        JsonTextError: The list is missing, or several lists could be it.
    """
    shown = ", ".join(scan.members) or "nothing"
    if field is not None:
        if field not in scan.lists:
            lists = ", ".join(scan.lists) or "none"
            raise JsonTextError(
                f"has no list {field} (found: {shown}; lists: {lists}); correct field: {field}"
            )
        return field
    if is_row(scan.members, columns):
        return None
    filled = [name for name in scan.lists if _is_rows(scan.members[name], columns)]
    empty = [name for name in scan.lists if not scan.members[name]]
    candidates = filled or empty
    if len(candidates) > 1:
        raise JsonTextError(
            f"has several lists ({', '.join(candidates)}); say which has the rows with field: {candidates[0]}"
        )
    return candidates[0] if candidates else None


def _is_rows(preview: object, columns: Columns) -> bool:
    first = preview[0] if isinstance(preview, list) and preview else None
    keys = turns.keys_of(columns)
    return isinstance(first, dict) or (isinstance(first, list) and turns.are_turns(first, keys))


def _elements(read: Read, field: str) -> Entries:
    text = _buffer(read)
    for name in _names(text):
        if text.next_sign() == "[" and name == field:
            yield from array_rows(text, to_end=False)
            return
        text.value(f"line {text.line}")


def _objects(read: Read) -> Entries:
    """Yield values one after another, each with the line on which it begins."""
    text = _buffer(read)
    while text.next_sign():
        line = text.line
        value, size = text.value(f"line {line}")
        yield line, value, size


def _require_json_lines(head: bytes) -> None:
    """Refuse a file none of whose first lines is JSON, instead of every line.

    Raises:
        JsonTextError: The file is not JSON.
    """
    tried = [line for line in head.split(b"\n") if line.strip()][:_LINES_TRIED]
    for line in tried:
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            continue
        return
    if tried:
        shown = tried[0].strip().decode(errors="replace")
        shown = shown[:_SHOWN] + ("..." if len(shown) > _SHOWN else "")
        raise JsonTextError(
            f"is not JSON (it begins with {shown!r}); write one JSON object a line, or end its name in .csv, "
            ".tsv or .txt if it is such a file"
        )
