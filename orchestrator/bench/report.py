"""Writes the report of a sweep from its results: a table as Markdown, CSV and JSON, and plots."""

from __future__ import annotations

from pathlib import Path

from orchestrator.atomic_files import read_object, write_json
from orchestrator.bench import results
from orchestrator.bench.layouts import LAYOUTS, table
from orchestrator.bench.results import Row
from orchestrator.bench.table import Table
from orchestrator.errors import SpecError

SWEEP = "sweep.json"
PLOTS = ("memory_over_length", "tgs_over_length", "scaling_over_workers", "step_time_by_phase")
_TABLES = ("md", "csv", "json")


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds the results of a sweep."""
    return (folder / results.RESULTS).exists()


def describe(folder: Path, name: str, layout: str, cells: list[str]) -> None:
    """Write sweep.json with the sweep's name, table layout and ordered cells."""
    write_json(folder / SWEEP, {"name": name, "layout": layout, "cells": cells})


def foreign_file(folder: Path) -> str | None:
    """Return a file that a sweep would overwrite in a folder of something else; None if there is none."""
    if (folder / SWEEP).exists():
        return None
    written = [results.RESULTS, *(f"table.{kind}" for kind in _TABLES), *(f"{name}.svg" for name in PLOTS)]
    return next((name for name in written if (folder / name).exists()), None)


def load(folder: Path, layout: str | None = None) -> tuple[Table, list[Row]]:
    """Return the table and rows of a sweep, which may be unfinished.

    Args:
        folder: Folder of the sweep.
        layout: Table layout; None uses the layout of the sweep file.

    Raises:
        SpecError: The folder does not belong to a sweep, or the layout is unknown.
    """
    if layout is not None and layout not in LAYOUTS:
        raise SpecError(f"--layout {layout} is not one of the layouts known; use {', '.join(LAYOUTS)}")
    described = read_object(folder / SWEEP)
    if described is None or not {"name", "layout", "cells"} <= described.keys():
        raise SpecError(f"{folder} has no readable {SWEEP}; name the folder STORAGE/NAME of a sweep")
    by_cell = {row.cell: row for row in results.read(folder)}
    rows = [by_cell[cell] for cell in described["cells"] if cell in by_cell]
    return table(layout or described["layout"], described["name"], rows), rows


def write(folder: Path, plots: bool) -> list[Path]:
    """Write table.md, table.csv, table.json and the plots to the folder of a sweep.

    Args:
        folder: Folder of the sweep.
        plots: Whether to draw plots.

    Returns:
        The files written.

    Raises:
        SpecError: The folder does not belong to a sweep, or plots need matplotlib, which is missing.
    """
    found, rows = load(folder)
    files = []
    for name, text in zip(_TABLES, (found.markdown(), found.csv(), found.json()), strict=True):
        path = folder / f"table.{name}"
        path.write_text(text, encoding="utf-8")
        files.append(path)
    if plots:
        from orchestrator.bench.plots import draw

        files += draw(rows, folder, found.title)
    return files
