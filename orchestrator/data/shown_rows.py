"""Selects rows of the training data to show: the first ones, or those of given files and lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.chat_template import choose
from orchestrator.data.model_tokenizer import load_tokenizer
from orchestrator.data.readers import Block, DataFile, locate
from orchestrator.data.row_selection import is_held_out
from orchestrator.data.row_view import RowView, view_row
from orchestrator.errors import SpecError

_HELD_OUT = "held out for evaluation (eval.share)"
_Found = tuple[SourceSpec, Block, int]
"""A row: its source, its block, and its position in the block."""


def collect(
    model: ModelSpec,
    data: DataSpec,
    count: int,
    wanted: Sequence[str] = (),
    evaluation: Sequence[SourceSpec] = (),
    share: float = 0.0,
    seed: int = 0,
) -> list[RowView]:
    """Return views of the first rows of the training data, over the sources in order, and of given rows.

    Rows that are left out are included, with the reason. Sample, weight and repeat have no effect.

    Args:
        model: Gives the tokenizer.
        data: The training data.
        count: Number of first rows.
        wanted: Further rows as FILE:LINE, the line being the row number in a file of a table.
        evaluation: Sources of evaluation data, which wanted rows may be of too.
        share: `eval.share`; rows of the training data that it holds out have a note.
        seed: `run.seed`.

    Raises:
        SpecError: A file cannot be read, or a wanted row does not exist.
    """
    tokenizer = load_tokenizer(model, data.chat_template)
    template = choose(data, model, tokenizer)
    named = [_parse_wanted(text) for text in wanted]
    found = [
        *islice(_all_rows(data.train), count),
        *(_find((*data.train, *evaluation), *each) for each in named),
    ]
    views = []
    for source, block, at in found:
        view = view_row(block.values[at], source.format, data, tokenizer, template, block.names)
        row_hash = view.content_hash if source in data.train else None
        if share and row_hash is not None and is_held_out(row_hash, share, seed):
            view = view.with_note(_HELD_OUT)
        views.append(replace(view, source=block.file, unit=block.unit, line=block.numbers[at]))
    first = len(views) - len(named)
    return [*_leave_out_duplicates(views[:first]), *views[first:]] if data.deduplicate else views


def _leave_out_duplicates(views: Sequence[RowView]) -> Iterator[RowView]:
    """Yield the first rows of the data with the reason for rows that equal an earlier one."""
    seen: dict[int, RowView] = {}
    for view in views:
        same = view if view.content_hash is None else seen.setdefault(view.content_hash, view)
        if same is view:
            yield view
        else:
            yield view.leave_out(f"duplicate: equals data file {same.source}, {same.unit} {same.line}")


def _all_rows(sources: Sequence[SourceSpec]) -> Iterator[_Found]:
    for source in sources:
        for file in locate(source):
            yield from _rows_of(source, file)


def _rows_of(source: SourceSpec, file: DataFile) -> Iterator[_Found]:
    for block in file.blocks():
        for at in range(len(block.values)):
            yield source, block, at


def _parse_wanted(text: str) -> tuple[str, int]:
    name, _, line = text.rpartition(":")
    if not (name and line.isascii() and line.isdecimal()):
        raise SpecError(f"--show-row={text} is not FILE:LINE; write, for example, data/train.jsonl:12")
    return name, int(line)


def _find(sources: Sequence[SourceSpec], name: str, line: int) -> _Found:
    files = [(source, file) for source in sources for file in locate(source)]
    matching = [(source, file) for source, file in files if _is_named(file, name)]
    if len({file.name for _, file in matching}) != 1:
        problem = "names several files" if matching else "is not a file"
        names = ", ".join(dict.fromkeys(file.name for _, file in (matching or files)[:8]))
        raise SpecError(f"--show-row={name}:{line} {problem} of the job's data; use one of {names}")
    source, file = matching[0]
    last = 0
    for found in _rows_of(source, file):
        last = found[1].numbers[found[2]]
        if last == line:
            return found
        if last > line:
            break
    raise SpecError(
        f"--show-row={name}:{line}: data file {file.name} has no row there; rows are numbered as in errors, "
        f"and the nearest one is {last}"
    )


def _is_named(file: DataFile, name: str) -> bool:
    """Return whether a name given by the user is the file's in messages, on disk, or its end."""
    is_same = file.uri is None and Path(resolve(name)).absolute() == Path(file.path).absolute()
    return is_same or name == file.name or file.name.endswith(f"/{name}")
