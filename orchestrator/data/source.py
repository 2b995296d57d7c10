"""Reading training rows from files, with every malformed row named by its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.paths import resolve

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Row:
    """One instruction and the response to be learnt, with the text of each."""

    instruction: str
    input: str
    output: str
    system: str = ""


def read_alpaca(path: str) -> list[Row]:
    """Read Alpaca rows from a JSON array or from JSON lines.

    Args:
        path: As `resolve` takes it.

    Returns:
        The rows in file order.

    Raises:
        SpecError: The file is missing, not JSON, empty, or has malformed rows; each names file and place.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for place, value in _values(_text(path), path):
        row = _row(value)
        if isinstance(row, str):
            problems.append(f"data file {path}, {place}: {row}")
        else:
            rows.append(row)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        rest = [f"data file {path}: {more} more malformed rows"] if more > 0 else []
        raise SpecError(*problems[:_SHOWN_PROBLEMS], *rest)
    if not rows:
        raise SpecError(f"data file {path} has no rows; give at least one row with instruction and output")
    return rows


def _text(path: str) -> str:
    try:
        return resolve(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(
            f"data file {path} cannot be read ({error.strerror}); check the path on every node"
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            f"data file {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None
    except ValueError as error:
        raise SpecError(f"data file {path!r} cannot be read ({error}); check the path") from None


def _values(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every row with its place: `row 3` in an array, `line 3` in JSON lines."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"data file {path} is not valid JSON ({error}); repair it there") from None
        yield from ((f"row {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", error


def _row(value: Any) -> Row | str:
    """Return the row, or the sentence that says why it is none."""
    if isinstance(value, Exception):
        return f"not valid JSON ({value}); write one JSON object a line"
    if not isinstance(value, dict):
        return f"a {type(value).__name__} where an object with instruction and output belongs"
    for field in ("instruction", "output"):
        if field not in value:
            return f"field {field} is missing (found: {', '.join(map(str, value)) or 'nothing'}); add it"
    found = {field: value.get(field) for field in ("instruction", "input", "output", "system")}
    texts = {field: "" if text is None else text for field, text in found.items()}
    for field, text in texts.items():
        if not isinstance(text, str):
            return f"field {field} is a {type(text).__name__}, and it must be text; write it in quotes"
        if not _is_unicode(text):
            return f"field {field} holds half of a surrogate pair, which is no character; repair the escape"
    if not texts["output"].strip():
        return "field output is empty, so there is nothing to learn; fill or remove the row"
    if not (texts["instruction"] + texts["input"]).strip():
        return "fields instruction and input are empty; fill or remove the row"
    return Row(**texts)


def _is_unicode(text: str) -> bool:
    """Tell whether the text can be encoded: JSON can escape half a surrogate pair, tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
