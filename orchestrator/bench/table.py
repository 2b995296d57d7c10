"""A table of typed values that renders as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

Value = str | float | int | None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        header: Its heading. In Markdown adjacent columns of one heading share a cell.
        unit: Unit of its numbers; empty for none.
        part: What it holds of what the heading names, where columns share one.
        form: Format of a number; text is shown as it is.
    """

    header: str
    unit: str = ""
    part: str = ""
    form: str = "{}"

    @property
    def name(self) -> str:
        """Heading, part and unit together: no two columns of a table have the same."""
        return " ".join(filter(None, (self.header, self.part, f"({self.unit})" if self.unit else "")))

    def show(self, value: Value) -> str:
        """Format a value for Markdown."""
        if value is None:
            return "-"
        return value if isinstance(value, str) else self.form.format(value)


def spread_of(header: str) -> Column:
    """Return the column with the interquartile range of the preceding column."""
    return Column(header, part="spread", form="±{:.1%}")


@dataclass(frozen=True)
class Table:
    """Rows of values, one a column.

    Attributes:
        title: What it shows.
        columns: Its columns.
        rows: Its rows, as many values each as there are columns.
        notes: Sentences below it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the table as Markdown, numbers to the right."""
        groups = [list(group) for _, group in itertools.groupby(self.columns, key=lambda each: each.header)]
        heads = [_head(group) for group in groups]
        body = []
        for row in self.rows:
            values = iter(row)
            body.append([_cell(group, [next(values) for _ in group]) for group in groups])
        widths = [max(len(line[at]) for line in (heads, *body)) for at in range(len(heads))]
        numeric = [
            all(_is_figure(row, self.columns.index(group[0])) for row in self.rows) for group in groups
        ]
        rule = [
            "-" * (width - 1) + ":" if right else "-" * width
            for width, right in zip(widths, numeric, strict=True)
        ]
        aligned = [
            [
                text.rjust(w) if right else text.ljust(w)
                for text, w, right in zip(line, widths, numeric, strict=True)
            ]
            for line in (heads, *body)
        ]
        lines = ["| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:])]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"## {self.title}", "", *lines, *notes]) + "\n"

    def csv(self) -> str:
        """Return the table as CSV: names of columns, then numbers in full, nothing where there is none."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return out.getvalue()

    def json(self) -> str:
        """Return the table as JSON: its rows are objects with the names of the columns as keys."""
        names = [column.name for column in self.columns]
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return (
            json.dumps(
                {"title": self.title, "columns": names, "rows": rows, "notes": [*self.notes]}, indent=1
            )
            + "\n"
        )


def _head(group: Sequence[Column]) -> str:
    units = " / ".join(column.unit for column in group if column.unit)
    return f"{group[0].header} ({units})" if units else group[0].header


def _cell(group: Sequence[Column], values: Sequence[Value]) -> str:
    """Return the text of columns that share a cell; missing values are left out if others are present."""
    shown = [column.show(value) for column, value in zip(group, values, strict=True) if value is not None]
    text = ""
    for each in shown:
        text += each if not text else f" {each}" if each.startswith("±") else f" / {each}"
    return text.replace("|", "\\|") or "-"


def _is_figure(row: Sequence[Value], at: int) -> bool:
    return not isinstance(row[at], str) or row[at] in ("OOM", "failed")
