"""Reads rows of CSV, TSV and text files one at a time; every cell and line is text."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain

from orchestrator.data.file_content import ContentError, not_utf8
from orchestrator.data.formats import Malformed

Entries = Iterator[tuple[int, object, int]]
_LARGEST_CELL = 64 * 2**20  # characters; a larger one is the rest of a file after a quote that is not closed


def text_rows(read: Callable[[], bytes]) -> Entries:
    """Yield a row {"text": line} for each line that is not blank, with its number from 1 and its size.

    Lines end at LF or CR LF, as in JSON lines.

    Raises:
        ContentError: The text is not UTF-8.
    """
    for number, line in enumerate(_lines(read), start=1):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}, len(line)


def csv_rows(read: Callable[[], bytes], delimiter: str) -> Entries:
    """Yield a row {column: text} for each record, with the number of its first line and its size.

    The first record has the names of the columns. An empty cell is an empty text. For a record with another
    number of cells, the reason why it is malformed takes the place of the row.

    Args:
        read: Returns the next chunk of bytes; empty at the end.
        delimiter: The delimiter; instead of a comma that the first line lacks, its `;`, tab or `|` is taken.

    Raises:
        ContentError: The text is not UTF-8, has no names of columns, or a quote that is not closed.
    """
    lines = _lines(read)
    start, delimiter = _delimiter(list(_first_lines(lines)), delimiter)
    csv.field_size_limit(_LARGEST_CELL)
    records = csv.reader(chain(start, lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    before = 0
    try:
        for cells in records:
            number, before = before + 1, records.line_num
            if not cells:
                continue  # a blank line
            if names is None:
                names = _columns(cells)
            elif len(cells) != len(names):
                yield number, Malformed(_unequal(cells, names)), 0
            else:
                yield number, dict(zip(names, cells, strict=True)), sum(map(len, cells))
    except csv.Error as error:
        if "new-line character" in str(error):
            raise ContentError(
                "has lines that end with CR alone; save it with LF at the end of lines"
            ) from None
        raise ContentError(
            f"is not valid CSV (line {before + 1}: {error}); within quotes write each quote twice"
        ) from None


def _delimiter(start: list[str], delimiter: str) -> tuple[list[str], str]:
    """Return the lines before the records and the first one of them, and the delimiter that it has.

    Raises:
        ContentError: A .tsv has commas.
    """
    first = start[-1] if start else ""
    if mark := re.fullmatch(r"sep=(.)\s*", first):  # written by Excel; the names follow
        return [*start[:-1], "\n"], mark[1]
    if delimiter == "," and "," not in first:
        return start, next((sign for sign in ";\t|" if sign in first), delimiter)
    if delimiter == "\t" and "\t" not in first and "," in first:
        raise ContentError(
            f"has commas and no tab in its first line ({first.strip()[:60]}); end its name in .csv"
        )
    return start, delimiter


def _first_lines(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines up to the first that is not blank."""
    for line in lines:
        yield line
        if line.strip():
            return


def _columns(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ContentError(
            f"has the column {repeated[0]!r} more than once ({', '.join(names)}); its first line must have a "
            "different name for each column"
        )
    return names


def _unequal(cells: list[str], names: list[str]) -> str:
    return (
        f"{len(cells)} cells where the first line names {len(names)} columns; write cells with delimiters or "
        "line ends in double quotes"
    )


def _lines(read: Callable[[], bytes]) -> Iterator[str]:
    """Yield lines with their ends, without a byte order mark.

    Raises:
        ContentError: A line is not UTF-8.
    """
    rest, number = b"", 0
    is_end = False
    while not is_end:
        more = read()
        is_end = not more
        *whole, rest = (rest + more).split(b"\n")
        for part in [*(line + b"\n" for line in whole), *([rest] if is_end else [])]:
            line = part if number else part.removeprefix(codecs.BOM_UTF8)
            number += 1
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise not_utf8(number) from None
            if text:
                yield text
