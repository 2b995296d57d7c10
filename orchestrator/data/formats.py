"""Parses rows of the supported data formats into the row types of `orchestrator.data.rows`.

alpaca              instruction, output; optional input, system, history, tools
messages            messages: [{role, content, tool_calls?}]; optional system, tools
sharegpt            conversations: [{from, value}]; optional system, tools
prompt_completion   prompt, completion; both text or both messages; with messages optional system, tools
text                text
tokens              input_ids; optional labels or completion_mask

A null counts as an empty text or list, because tables store missing values as null. Rows without trained
tokens are detected later, in `orchestrator.data.rows`. `read` reports the fields that are not used; a row is
refused if training without one of its fields would teach something else than the row says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.data.field_use import FieldUse
from orchestrator.data.learn_marks import LISTS, row_weights
from orchestrator.data.messages import read_messages
from orchestrator.data.refused_rows import require_no_preference, require_trainable
from orchestrator.data.row_values import Malformed as Malformed
from orchestrator.data.row_values import (
    has_value,
    list_of,
    names,
    require,
    text_of,
    unicode_text,
)
from orchestrator.data.rows import (
    Conversation,
    Instruction,
    Message,
    Row,
    Text,
    as_conversation,
)
from orchestrator.data.token_rows import TOKEN_FIELDS, read_tokens
from orchestrator.data.tool_calls import tools_of

Format = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens"]
RowFormat = Format | Literal["auto"]
_SYSTEM = ("system", "system_prompt")
_OF_CHATS = (*_SYSTEM, "tools", "functions")
# Fields that a format reads, without the lists of weights; others that have a value have no effect.
_READ: dict[Format, frozenset[str]] = {
    "alpaca": frozenset(("instruction", "input", "output", "history", *_OF_CHATS)),
    "messages": frozenset(("messages", *_OF_CHATS)),
    "sharegpt": frozenset(("conversations", *_OF_CHATS)),
    "prompt_completion": frozenset(("prompt", "completion", *_OF_CHATS)),
    "text": frozenset(("text",)),
    "tokens": TOKEN_FIELDS,
}


@dataclass(frozen=True)
class ReadRow:
    """A parsed row, and what of it is not used.

    Attributes:
        row: The row.
        use: Fields that its tokens may not depend on.
        null: The first required field that is null; empty if none is.
    """

    row: Row
    use: FieldUse
    null: str = ""


def parse(value: object, row_format: RowFormat) -> Row:
    """Parse one row; see `read`."""
    return read(value, row_format).row


def read(value: object, row_format: RowFormat) -> ReadRow:
    """Parse one row, and list its fields without effect.

    Args:
        value: JSON as bytes, an already parsed value, or why the row is malformed.
        row_format: The format; `auto` detects it from the row's fields.

    Raises:
        Malformed: The value does not match the format, or says something that training cannot follow.
    """
    if isinstance(value, Malformed):
        raise value
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except UnicodeDecodeError as error:
            raise Malformed(f"not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise Malformed(f"not valid JSON ({error}); write one JSON object a line") from None
    if not isinstance(value, dict):
        raise Malformed(f"a {type(value).__name__} where an object with fields belongs")
    if row_format not in ("text", "tokens"):
        require_no_preference(value)
    if row_format == "auto":
        row_format = detect(value)
    if row_format != "tokens":
        require_trainable(value, has_answers=row_format != "text")
    use = FieldUse()
    row = _READERS[row_format](value, use)
    read_fields = _READ[row_format]
    unread = {name for name, content in value.items() if name not in read_fields and has_value(content)}
    if unread and row_format in ("messages", "sharegpt"):
        unread -= {name for name in LISTS if isinstance(value.get(name), list)}
    use.without_effect |= unread
    null = next((name for name in _REQUIRED[row_format] if value[name] is None), "")
    return ReadRow(row, use, null)


def detect(value: Mapping[str, object]) -> Format:
    """Detect the format of a row from the names of its fields.

    Raises:
        Malformed: The fields match none of the formats.
    """
    filled = {name for name, content in value.items() if content is not None}
    # A table with mixed formats fills the columns of the other formats with nulls, so fields with a value are
    # tried first. Only a row whose fields are all null falls back to the names of its columns.
    for fields in (filled, set(value)):
        tests: list[tuple[Format, bool]] = [
            ("tokens", "input_ids" in fields),
            ("messages", "messages" in fields),
            ("sharegpt", "conversations" in fields),
            ("prompt_completion", "prompt" in fields and "completion" in fields),
            ("alpaca", bool(fields & {"instruction", "output"})),
            ("text", "text" in fields),
        ]
        for name, fits in tests:
            if fits:
                return name
    raise Malformed(
        f"the fields {names(value)} are of no known format; say which with format: alpaca (instruction and "
        "output), messages, sharegpt, prompt_completion, text or tokens, and name the fields so"
    )


def _alpaca(value: Mapping[str, object], use: FieldUse) -> Row:
    require(value, "instruction", "output")
    texts = {name: text_of(value, name) for name in ("instruction", "input", "output")}
    if texts["output"].strip() and not (texts["instruction"] + texts["input"]).strip():
        raise Malformed(
            "fields instruction and input are empty, so field output answers nothing; fill or remove the row"
        )
    history = []
    for turn in list_of(value, "history") if value.get("history") else ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise Malformed("field history must be a list of [question, answer] pairs of text; correct it")
        history.append((unicode_text(turn[0], "history"), unicode_text(turn[1], "history")))
    row = Instruction(**texts, system=_system(value), history=tuple(history))
    tools = tools_of(value)
    return Conversation(as_conversation(row).messages, tools) if tools else row


def _messages(value: Mapping[str, object], use: FieldUse) -> Row:
    return _conversation(value, "messages", ("role", "content"), use)


def _sharegpt(value: Mapping[str, object], use: FieldUse) -> Row:
    require(value, "conversations")
    turns = list_of(value, "conversations")
    is_openai = turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns)
    fields = ("role", "content") if is_openai else ("from", "value")
    return _conversation(value, "conversations", fields, use)


def _conversation(
    value: Mapping[str, object], field: str, fields: tuple[str, str], use: FieldUse
) -> Conversation:
    require(value, field)
    messages = read_messages(list_of(value, field), field, use, fields)
    weights = row_weights(value, [message["role"] == "assistant" for message in messages])
    for message, weight in zip(messages, weights or (), strict=bool(weights)):
        message["weight"] = min(weight, message.get("weight", 1))
    return Conversation(_with_system(value, messages), tools_of(value))


def _system(value: Mapping[str, object]) -> str:
    texts = {name: text for name in _SYSTEM if name in value and (text := text_of(value, name))}
    if len(set(texts.values())) > 1:
        raise Malformed(f"fields {' and '.join(texts)} differ; keep one of them")
    return next(iter(texts.values()), "")


def _with_system(value: Mapping[str, object], messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages, with the system prompt of the row as the first."""
    system = _system(value)
    if not system:
        return tuple(messages)
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"].strip() == system.strip():
            return tuple(messages)
        raise Malformed("field system differs from the system message of the conversation; keep one of them")
    return ({"role": "system", "content": system}, *messages)


def _prompt_completion(value: Mapping[str, object], use: FieldUse) -> Row:
    require(value, "prompt", "completion")
    prompt, completion = value["prompt"], value["completion"]
    filled = [each for each in (prompt, completion) if each is not None]
    if filled and all(isinstance(each, list) for each in filled):
        before, after = (
            read_messages(list_of(value, field), field, use) for field in ("prompt", "completion")
        )
        for message in before:
            message["weight"] = 0
        return Conversation(_with_system(value, (*before, *after)), tools_of(value))
    texts = {name: text_of(value, name) for name in ("prompt", "completion")}
    if given := [name for name in _OF_CHATS if has_value(value.get(name))]:
        raise Malformed(
            f"field {given[0]} has no place in a prompt that is text; write it into the prompt, or give "
            "prompt and completion as messages"
        )
    return Text(**texts)


def _plain_text(value: Mapping[str, object], use: FieldUse) -> Row:
    require(value, "text")
    return Text(text_of(value, "text"))


def _tokens(value: Mapping[str, object], use: FieldUse) -> Row:
    return read_tokens(value)


_READERS: dict[Format, Callable[[Mapping[str, Any], FieldUse], Row]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "tokens": _tokens,
}
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "alpaca": ("output",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("completion",),
    "text": ("text",),
    "tokens": ("input_ids",),
}
