"""Gives rows the field names of the data formats, by `columns` of the source or by names in common use.

Runs before `orchestrator.data.formats.parse`. A row that has the fields of a format is not changed, except
for the keys and roles of its messages. `columns` and `roles` of a source take precedence over the names that
are known here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from orchestrator.data import turns
from orchestrator.data.formats import Malformed, RowFormat
from orchestrator.data.row_values import yaml_key

Columns = Mapping[str, str | None]
"""`SourceSpec.columns`: the field for the name of a column; None leaves the column out."""


@dataclass(frozen=True)
class RowNames:
    """Names that the rows of a source have for fields and roles.

    Attributes:
        columns: `SourceSpec.columns`.
        roles: `SourceSpec.roles`: the role for the name of a role.
    """

    columns: Columns = dataclasses.field(default_factory=dict)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)


_OPTIONAL = frozenset({"input", "system", "history", "tools", "labels", "completion_mask"})
_QUESTIONS = (
    "instruction", "prompt", "query", "question", "problem", "user", "human", "input_text",
)  # fmt: skip
_INPUTS = ("input", "inputs", "context")
_ANSWERS = (
    "output", "response", "answer", "completion", "solution", "assistant", "target", "targets", "reply",
    "output_text", "answers",
)  # fmt: skip
_ALPACA = {"instruction", "input", "output"}
_LISTS = ("history", "input_ids", "labels", "completion_mask")
_NAMED = "instruction, input, output, system, history, messages, tools, prompt, completion, text"


def named_values(values: Sequence[object], names: RowNames, row_format: RowFormat) -> Iterator[object]:
    """Yield rows with the field names of their format; for a malformed row, why it is malformed."""
    for value in values:
        try:
            yield with_field_names(value, names, row_format)
        except Malformed as problem:
            yield problem


def with_field_names(value: object, names: RowNames, row_format: RowFormat) -> object:
    """Return a row with the names of fields and roles of its format.

    Args:
        value: JSON as bytes, or a parsed value; a list of messages becomes a row of messages.
        names: Names of the source.
        row_format: The format; `auto` recognizes it from the names.

    Returns:
        The row. A value that is not valid JSON or not an object is returned as it is, for `parse` to refuse.

    Raises:
        Malformed: The fields are of no known format, or ambiguous, or differ from `columns`.
    """
    if isinstance(value, Malformed):  # found by the reader of the file
        raise value
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and value.keys() == _ALPACA and not names.columns:
        return value
    keys = turns.keys_of(names.columns)
    if isinstance(value, list) and turns.are_turns(value, keys):
        value = {"messages": value}
    if not isinstance(value, dict):
        return value
    row: Mapping[str, object] = _renamed(value, names.columns) if names.columns else value
    row = turns.with_messages(_with_lists(row), keys, names.roles)
    if _is_complete(row, row_format, {name for name, content in row.items() if content is not None}):
        return row
    if row_format in ("auto", "alpaca"):
        return _as_instruction(row, row_format)
    return row


def example(names: Sequence[str]) -> str:
    """Return an example of `columns` for the names of a row that are not known."""
    keys = [yaml_key(name) for name in names]
    fields = ["text"] if len(keys) == 1 else ["instruction", "output"]
    chosen = [keys[0], keys[-1]] if len(keys) > 1 else keys
    return ", ".join(f"{key}: {field}" for key, field in zip(chosen, fields, strict=True))


def is_row(value: Mapping[str, object], columns: Columns) -> bool:
    """Return whether an object is a row, and not one that holds rows.

    Args:
        value: The object; of its lists, the first elements are enough.
        columns: `SourceSpec.columns`.
    """
    if any(name in value for name, field in columns.items() if field not in turns.FIELDS):
        return True
    try:
        row = with_field_names(value, RowNames(columns), "auto")
    except Malformed:
        return False
    if not isinstance(row, Mapping):
        return False
    messages = next((row[name] for name in ("messages", "conversations") if name in row), None)
    return messages is None or not isinstance(messages, list) or turns.are_turns(messages)


def _renamed(row: Mapping[str, object], columns: Columns) -> dict[str, object]:
    """Return the row with its columns renamed.

    Raises:
        Malformed: A column is missing, or two columns have the same field.
    """
    found: dict[str, object] = {}
    for name, field in columns.items():
        if field in turns.FIELDS:
            continue
        if name in row and field is not None:
            found[field] = row[name]
        elif name not in row and field is not None and field not in _OPTIONAL:
            raise Malformed(
                f"column {name}, which columns maps to {field}, is missing (found: {_shown(row)}); correct "
                "columns"
            )
    for name, content in row.items():
        if name in columns and columns[name] not in turns.FIELDS:
            continue
        if name in found:
            raise Malformed(
                f"columns maps another column to {name}, and the row has a column {name} too; leave it out "
                f"with columns: {{{name}: null}}"
            )
        found[name] = content
    return found


def _with_lists(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return the row with lists that are stored as JSON text parsed, as in CSV files."""
    texts = {name: text for name in _LISTS if isinstance(text := row.get(name), str)}
    parsed = {
        name: turns.list_from_text(text, name) if text.strip() else None for name, text in texts.items()
    }
    return {**row, **parsed} if parsed else row


def _is_complete(row: Mapping[str, object], row_format: RowFormat, filled: Set[str]) -> bool:
    """Return whether a row has the required fields of its format, or of any format if it is `auto`.

    Args:
        row: The row.
        row_format: Its format.
        filled: Names of fields that count as present; of a pair of fields, one of them is enough.
    """
    if row_format not in ("auto", "alpaca"):
        return True
    pairs: list[tuple[str, str]] = [("instruction", "output")]
    if row_format == "auto":
        pairs.append(("prompt", "completion"))
        if filled & {"input_ids", "messages", "conversations"} or {"chosen", "rejected"} <= row.keys():
            return True
    if any(pair[0] in row and pair[1] in row and not filled.isdisjoint(pair) for pair in pairs):
        return True
    return row_format == "auto" and "text" in filled and "instruction" not in filled


def _as_instruction(row: Mapping[str, object], row_format: RowFormat) -> Mapping[str, object]:
    """Return the row as an instruction and its output, or as messages if it has tools.

    Raises:
        Malformed: It has no question and answer of known names, or several of one of them.
    """
    names = {str(name).strip().lower(): name for name in reversed(list(row))}
    names |= {str(name).strip().lower(): name for name in reversed(list(row)) if row[name] is not None}
    # `input` is the question only of rows without another one.
    has_question = any(name in names for name in _QUESTIONS)
    question = _choose(row, names, _QUESTIONS if has_question else _INPUTS, "instruction")
    answer = _choose(row, names, _ANSWERS, "output")
    if question is None or answer is None:
        return _without_answer(row, row_format, names)
    if row[question] is None and row[answer] is None and _is_complete(row, row_format, row.keys()):
        return row
    given = _choose(row, names, _INPUTS, "input") if has_question else None
    fields = {question: "instruction", answer: "output"} | ({given: "input"} if given is not None else {})
    if "system" not in row and "system_prompt" in names:
        fields[names["system_prompt"]] = "system"
    found: dict[str, object] = {fields.get(name, name): content for name, content in row.items()}
    if found.get("tools"):
        return _with_tools(found, str(answer))
    if str(answer).lower() == "answers" and not isinstance(row[answer], str):
        raise Malformed(
            f"field {answer} is a {type(row[answer]).__name__}, which can hold several answers; write the "
            "one to learn as text in a field answer"
        )
    return found


def _without_answer(
    row: Mapping[str, object], row_format: RowFormat, names: Mapping[str, str]
) -> Mapping[str, object]:
    """Return a row that is not a question and an answer, for `parse` to read or refuse.

    Raises:
        Malformed: The fields are of no known format.
    """
    if "text" in names and row_format == "auto":
        return row if "text" in row else {**row, "text": row[names["text"]]}
    is_known = not {"instruction", "output"}.isdisjoint(row) or _is_complete(row, row_format, row.keys())
    if is_known:
        return row
    raise Malformed(_unknown(row))


def _choose(
    row: Mapping[str, object], names: Mapping[str, str], candidates: Sequence[str], field: str
) -> str | None:
    """Return the only column with a value among the candidates for a field, else one without, or None.

    Raises:
        Malformed: The row has several of them.
    """
    present = [names[name] for name in candidates if name in names]
    several = [name for name in present if row[name] is not None] or present[:1]
    if len(several) > 1:
        mapped = ", ".join([f"{several[0]}: {field}", *(f"{name}: null" for name in several[1:])])
        raise Malformed(
            f"the fields {', '.join(several)} could each be {field}; choose one with columns: {{{mapped}}}"
        )
    return several[0] if several else None


def _with_tools(row: Mapping[str, object], answer: str) -> Mapping[str, object]:
    """Return a row of messages for an instruction with tools; `answers` are tool calls, as in xlam's data."""
    texts = (row["instruction"], row.get("input"))
    question = "\n".join(text for text in texts if isinstance(text, str) and text)
    messages: list[dict[str, object]] = (
        [{"role": "system", "content": row["system"]}] if row.get("system") else []
    )
    messages.append({"role": "user", "content": question})
    calls = row["output"]
    if answer.lower() == "answers":
        calls = turns.list_from_text(calls, answer) if isinstance(calls, str) else calls
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    else:
        messages.append({"role": "assistant", "content": calls})
    used = ("instruction", "input", "output", "system")
    return {**{name: content for name, content in row.items() if name not in used}, "messages": messages}


def _unknown(row: Mapping[str, object]) -> str:
    names = [str(name) for name in row]
    if not names:
        return "the row has no fields; remove it"
    if turns.are_turns([row]):
        return (
            f"the row is one message (it has {_shown(row)}), and a row is a whole conversation; write its "
            "messages as one list, [[{...}, {...}], ...]"
        )
    fields = (
        f"the field {_shown(row)} is not that"
        if len(names) == 1
        else f"the fields {_shown(row)} are not those"
    )
    return (
        f"{fields} of a known format; say what is meant with columns, such as columns: {{{example(names)}}} "
        f"({_NAMED})"
    )


def _shown(row: Mapping[str, object]) -> str:
    names = ", ".join(map(str, row)) or "nothing"
    return names.encode(errors="backslashreplace").decode()
