"""Rows of Excel workbooks."""

import datetime
import sys
from pathlib import Path

import pytest

from orchestrator.data import workbook
from orchestrator.data.readers import locate
from orchestrator.data.rows import Instruction
from tests.unit.data.test_file_kinds import packed, rows_of, written
from tests.unit.data.test_readers import blocks_of, problem_of, source


def test_a_workbook_requires_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = written(tmp_path, "a.xlsx", packed("docx"))
    assert problem_of(path) == (
        f"data file {path} is an Excel workbook, and reading it requires openpyxl; install the extra `xlsx` "
        "(pip install openpyxl), or save it as CSV"
    )


def test_rows_of_a_workbook_are_those_of_the_table(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="needs the extra xlsx")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "rows"
    for row in (
        ["question", None, "answer "],
        [None],
        [7, None, "007"],
        [1.0, "note", True],
        ["a", None, None],
    ):
        sheet.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    wanted = [Instruction("7", "", "007"), Instruction("1", "", "TRUE"), Instruction("a", "", "")]
    assert rows_of(tmp_path / "a.xlsx") == wanted
    (block,) = blocks_of(locate(source(tmp_path / "a.xlsx")))
    assert block.numbers == (3, 4, 5)
    assert block.values[1] == {"question": "1", "": "note", "answer": "TRUE"}
    book.create_sheet("more").append(["text"])
    book.save(tmp_path / "b.xlsx")
    assert rows_of(tmp_path / "b.xlsx", field="rows") == wanted
    assert "has several sheets (rows, empty, more); say which with field: rows" in problem_of(
        tmp_path / "b.xlsx"
    )
    assert "has no sheet x (found: rows, empty, more)" in problem_of(tmp_path / "b.xlsx", field="x")
    path = written(tmp_path, "c.xlsx", packed("docx"))
    assert "cannot be read as a workbook (" in problem_of(path)


def test_values_of_cells_of_a_workbook() -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4)
    cells = [None, "", "007", 7, 7.0, 7.25, True, day, day.date()]
    texts = ["", "", "007", "7", "7", "7.25", "TRUE", "2026-01-02T03:04:00", "2026-01-02"]
    assert [workbook._text(cell) for cell in cells] == texts
