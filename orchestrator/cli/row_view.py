"""Prints rows token by token, with the tokens of the loss in colour or between marks, and as an HTML page."""

from __future__ import annotations

import html
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.checks.folders import with_absolute_paths
from orchestrator.cli.output import stdout_for_results, write_message, write_result
from orchestrator.config.eval_sets import eval_sources
from orchestrator.config.schema import JobSpec
from orchestrator.data.row_view import RowView
from orchestrator.data.shown_rows import collect
from orchestrator.errors import OrchestratorError, SpecError

Kind = Literal["context", "learnt", "cut", "gap"]
"""A token outside the loss, one in the loss, one removed by truncation, or text that no token covers."""
_MARKS = {"learnt": ("⟦", "⟧"), "cut": ("⟪", "⟫"), "context": ("", ""), "gap": ("", "")}
_SEPARATOR = "│"
_OWN_SIGNS = "⟦⟧⟪⟫│↵"  # escaped where the row itself contains them
_RESET = "\x1b[0m"
# Two shades of each kind alternate, so that token borders are visible without extra characters.
_COLOURS = {
    "context": ("\x1b[39m", "\x1b[2m"),
    "learnt": ("\x1b[30;42m", "\x1b[30;102m"),
    "cut": ("\x1b[9;31m", "\x1b[9;2;31m"),
    "gap": ("\x1b[4m", "\x1b[4m"),
}
_SPECIAL = "\x1b[1m"
_LEGEND = "learnt: between ⟦ ⟧, cut by truncation: between ⟪ ⟫, │ separates tokens, ↵ is a line break"
_COLOUR_LEGEND = (
    f"{_COLOURS['learnt'][0]}learnt{_RESET}, {_COLOURS['context'][0]}not learnt{_RESET}, "
    f"{_COLOURS['cut'][0]}cut by truncation{_RESET}, {_SPECIAL}special token{_RESET}, ↵ line break; "
    "shades alternate by token"
)


@dataclass(frozen=True)
class _Segment:
    """The text of one token, or of a gap between tokens."""

    text: str
    kind: Kind
    token: int = -1
    starts_document: bool = False


@contextmanager
def shown_rows(
    job: JobSpec, count: int, wanted: Sequence[str], page: Path | None, as_json: bool
) -> Iterator[dict[str, object]]:
    """Print rows of the training data, before the data are packed.

    Args:
        job: The job.
        count: Number of first rows.
        wanted: Further rows as FILE:LINE.
        page: Path of an HTML page with the rows; None writes none.
        as_json: Yield the rows and print nothing, unless an error follows: it may be about one of them.

    Yields:
        `rows_shown`, if rows are shown.

    Raises:
        SpecError: The rows cannot be read, or `page` cannot be written.
    """
    if not (count or wanted):
        if page:
            raise SpecError(f"--html={page} requires rows to show; add --show N or --show-row FILE:LINE")
        yield {}
        return
    with stdout_for_results():
        with_paths = with_absolute_paths(job)
        evaluation = [source for _, source in eval_sources(with_paths)]
        share = job.eval.share or 0.0 if job.eval else 0.0
        views = collect(with_paths.model, with_paths.data, count, wanted, evaluation, share, job.run.seed)
    if page:
        write_html(views, page, f"Rows of {job.name}")
        write_message(f"written: {page}")
    shown: dict[str, object] = {"rows_shown": [view.as_json() for view in views]}
    if not as_json:
        write_result(as_text(views, use_colour()) + "\n")
    try:
        yield shown
    except OrchestratorError:
        if as_json:
            write_result(json.dumps(shown))
        raise


def use_colour() -> bool:
    """Return whether stdout is a terminal that should get colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def as_text(views: Sequence[RowView], colour: bool) -> str:
    """Return the rows as text, for a terminal or, without `colour`, for a file or pipe."""
    write = _coloured if colour else _marked
    blocks = [_COLOUR_LEGEND if colour else _LEGEND]
    for view in views:
        body = write(view) if len(view.ids) else _visible(view.raw)
        blocks.append("\n".join([*_heading(view), *(f"  {line}" for line in body.split("\n"))]))
    return "\n\n".join(blocks)


def write_html(views: Sequence[RowView], file: Path, title: str) -> None:
    """Write one self-contained page with the rows.

    Raises:
        SpecError: The file cannot be written.
    """
    sections = "\n".join(_section(view) for view in views)
    page = _PAGE.format(title=html.escape(title), sections=sections)
    try:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise SpecError(f"--html={file} cannot be written ({error.strerror}); name a writable file") from None


def _heading(view: RowView) -> Iterator[str]:
    yield f"data file {view.source}, {view.unit} {view.line}"
    facts = [f"template: {view.template}", f"tokens: {len(view.ids):,}, {int(view.learnt.sum()):,} learnt"]
    if view.left_out is None and not view.kept.all():
        facts.append(f"{int((~view.kept).sum()):,} cut by truncation")
    if len(view.starts) > 1:
        facts.append(f"{len(view.starts)} documents")
    if len(view.ids):
        yield f"  {'; '.join(facts)}"
    if view.left_out:
        yield f"  left out: {view.left_out}"
    if view.note:
        yield f"  note: {view.note}"


def _segments(view: RowView) -> Iterator[_Segment]:
    """Yield the tokens in order, and the text between them; every character belongs to one segment."""
    end = 0
    for token, (first, last) in enumerate(view.spans.tolist()):
        if first > end:
            yield _Segment(view.text[end:first], "gap")
        is_cut = view.left_out is None and not view.kept[token]
        kind: Kind = "cut" if is_cut else "learnt" if view.learnt[token] else "context"
        yield _Segment(view.text[max(first, end) : last], kind, token, token in view.starts[1:])
        end = max(end, last)
    if end < len(view.text):
        yield _Segment(view.text[end:], "gap")


def _marked(view: RowView) -> str:
    parts: list[str] = []
    kind: Kind = "context"
    for segment in _segments(view):
        if segment.starts_document:
            parts.append(f"{_MARKS[kind][1]}\n")
            kind = "context"
        if segment.kind != kind:
            parts += [_MARKS[kind][1], _MARKS[segment.kind][0]]
        elif parts and not segment.starts_document:
            parts.append(_SEPARATOR)
        kind = segment.kind
        parts.append(_visible(segment.text, _OWN_SIGNS))
    return "".join([*parts, _MARKS[kind][1]])


def _coloured(view: RowView) -> str:
    parts: list[str] = []
    for segment in _segments(view):
        is_special = segment.token >= 0 and bool(view.special[segment.token])
        code = _COLOURS[segment.kind][segment.token % 2] + _SPECIAL * is_special
        # Colours end before a line break, so that the rest of a terminal's line is not filled.
        text = _visible(segment.text).replace("\n", f"{_RESET}\n{code}")
        parts.append("\n" * segment.starts_document + code + text + _RESET)
    return "".join(parts)


def _visible(text: str, signs: str = "") -> str:
    """Return text in which line breaks and other characters that do not print are visible."""
    return "".join(_visible_character(each, signs) for each in text)


def _visible_character(character: str, signs: str) -> str:
    if character == "\n":
        return "↵\n"
    if character.isprintable() and character not in signs:
        return character
    return (
        character.encode("ascii", "backslashreplace").decode()
        if character > "\x7f"
        else repr(character)[1:-1]
    )


def _section(view: RowView) -> str:
    heading, *facts = _heading(view)
    lines = "".join(f"<p>{html.escape(fact.strip())}</p>" for fact in facts)
    body = "".join(_span(view, each) for each in _segments(view)) or html.escape(_visible(view.raw))
    return f"<section><h2>{html.escape(heading)}</h2>{lines}<pre>{body}</pre></section>"


def _span(view: RowView, segment: _Segment) -> str:
    classes: list[str] = [segment.kind]
    about = ""
    if segment.token >= 0:
        classes += ["odd"] * (segment.token % 2) + ["special"] * bool(view.special[segment.token])
        about = f' title="token {segment.token}, id {int(view.ids[segment.token])}"'
    border = "<hr>" if segment.starts_document else ""
    return f'{border}<span class="{" ".join(classes)}"{about}>{html.escape(_visible(segment.text))}</span>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }}
h2 {{ font-size: 1em; margin: 2em 0 0; }}
p {{ margin: 0; color: #555; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }}
pre {{ border: 1px solid #ccc; padding: .7em; }}
.context {{ background: #f4f4f4; color: #444; }}
.context.odd {{ background: #e6e6e6; }}
.learnt {{ background: #b7ebc0; color: #000; }}
.learnt.odd {{ background: #93d9a0; }}
.cut {{ color: #a33; text-decoration: line-through; }}
.gap {{ text-decoration: underline dotted; }}
.special {{ font-weight: bold; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><span class="learnt">learnt</span> <span class="context">not learnt</span>
<span class="cut">cut by truncation</span> <span class="context special">special token</span>;
shades alternate by token, and a token's id shows under the pointer.</p>
{sections}
</body>
</html>
"""
