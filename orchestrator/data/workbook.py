"""Reads the rows of an Excel workbook (.xlsx) with openpyxl, which is the optional extra `xlsx`."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import IO, Any

from orchestrator.data.file_content import ContentError

Entries = Iterator[tuple[int, object, int]]


def workbook_rows(file: IO[bytes], sheet: str | None) -> Entries:
    """Yield a row {column: text} for each row of a sheet, with its number in the sheet and its size.

    The first row that is not empty has the names of the columns. An empty cell is an empty text.

    Args:
        file: The workbook, opened for reading.
        sheet: Name of the sheet; None for the only one with rows.

    Raises:
        ContentError: openpyxl is not installed, the file is not a workbook, or the sheet is missing.
    """
    try:
        import openpyxl
    except ImportError:
        raise ContentError(
            "is an Excel workbook, and reading it requires openpyxl; install the extra `xlsx` (pip install "
            "openpyxl), or save it as CSV"
        ) from None
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ContentError(f"cannot be read as a workbook ({reason}); save it as .xlsx or .csv") from None
    names: list[str] | None = None
    for number, row in enumerate(_sheet(book, sheet).iter_rows(values_only=True), start=1):
        cells = [_text(cell) for cell in row]
        if not any(cells):
            continue
        if names is None:
            names = _columns(cells)
            continue
        names += [f"column {at + 1}" for at in range(len(names), len(cells))]
        kept = {name: cell for name, cell in zip(names, cells, strict=False) if name or cell}
        yield number, kept, sum(map(len, cells))


def _sheet(book: Any, name: str | None) -> Any:
    """Return the sheet of a name, or the only one with rows."""
    names = ", ".join(book.sheetnames)
    if name is not None:
        if name not in book.sheetnames:
            raise ContentError(f"has no sheet {name} (found: {names}); correct field: {name}")
        return book[name]
    filled = [
        sheet for sheet in book.worksheets if any(any(row) for row in sheet.iter_rows(values_only=True))
    ]
    if len(filled) > 1:
        raise ContentError(f"has several sheets ({names}); say which with field: {filled[0].title}")
    return filled[0] if filled else book.worksheets[0]


def _columns(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    filled = [name for name in names if name]
    if repeated := sorted({name for name in filled if filled.count(name) > 1}):
        raise ContentError(
            f"has the column {repeated[0]!r} more than once; give each column another name in its first row"
        )
    return names


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell)
