"""Parses rows of the supported data formats into the row types of `orchestrator.data.rows`.

alpaca              instruction, output; optional input, system, history
messages            messages: [{role, content, tool_calls?}]; optional tools
sharegpt            conversations: [{from, value}]; optional system, tools
prompt_completion   prompt, completion; both text or both messages
text                text
tokens              input_ids; optional labels or completion_mask

A null counts as an empty text or list, because tables store missing values as null. Rows without trained
tokens are detected later, in `orchestrator.data.rows`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from orchestrator.data.rows import (
    Conversation,
    Instruction,
    JsonObject,
    Message,
    ParsedArguments,
    Row,
    Text,
    Tokens,
)

Format = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens"]
RowFormat = Format | Literal["auto"]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


class Malformed(ValueError):
    """A row does not match its format; the message names the reason and the fix."""


def parse(value: object, row_format: RowFormat) -> Row:
    """Parse one row.

    Args:
        value: JSON as bytes, an already parsed value, or why the row is malformed.
        row_format: The format; `auto` detects it from the row's fields.

    Raises:
        Malformed: The value does not match the format.
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
    return _READERS[detect(value) if row_format == "auto" else row_format](value)


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
        f"the fields {_names(value)} are of no known format; say which with format: alpaca (instruction and "
        "output), messages, sharegpt, prompt_completion, text or tokens, and name the fields so"
    )


def _alpaca(value: Mapping[str, object]) -> Row:
    _require(value, "instruction", "output")
    texts = {name: _text(value, name) for name in ("instruction", "input", "output", "system")}
    if texts["output"].strip() and not (texts["instruction"] + texts["input"]).strip():
        raise Malformed(
            "fields instruction and input are empty, so field output answers nothing; fill or remove the row"
        )
    history = []
    for turn in _list(value, "history") if value.get("history") else ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise Malformed("field history must be a list of [question, answer] pairs of text; correct it")
        history.append((_unicode(turn[0], "history"), _unicode(turn[1], "history")))
    return Instruction(**texts, history=tuple(history))


def _messages(value: Mapping[str, object], field: str = "messages") -> Row:
    _require(value, field)
    messages = [_message(each, f"{field}[{at}]") for at, each in enumerate(_list(value, field))]
    return Conversation(tuple(messages), _tools(value))


def _sharegpt(value: Mapping[str, object]) -> Row:
    _require(value, "conversations")
    turns = _list(value, "conversations")
    if all(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in turns) and turns:
        return _messages(value, "conversations")
    system = _text(value, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for at, turn in enumerate(turns):
        place = f"conversations[{at}]"
        if not isinstance(turn, Mapping):
            raise Malformed(f"{place} is a {type(turn).__name__} where an object with from and value belongs")
        _require(turn, "from", "value", place=place)
        role = _SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise Malformed(
                f"{place}.from={turn['from']!r} is unknown; use one of {', '.join(_SHAREGPT_ROLES)}"
            )
        content = _unicode("" if turn["value"] is None else turn["value"], f"{place}.value")
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
            if role == "function_call"
            else {"role": role, "content": content}
        )
    return Conversation(tuple(messages), _tools(value))


def _prompt_completion(value: Mapping[str, object]) -> Row:
    _require(value, "prompt", "completion")
    prompt, completion = value["prompt"], value["completion"]
    filled = [each for each in (prompt, completion) if each is not None]
    if filled and all(isinstance(each, list) for each in filled):
        before, after = (
            [_message(each, f"{field}[{at}]") for at, each in enumerate(_list(value, field))]
            for field in ("prompt", "completion")
        )
        for message in before:
            message["weight"] = 0
        return Conversation((*before, *after), _tools(value))
    return Text(**{name: _text(value, name) for name in ("prompt", "completion")})


def _plain_text(value: Mapping[str, object]) -> Row:
    _require(value, "text")
    return Text(_text(value, "text"))


def _tokens(value: Mapping[str, object]) -> Row:
    _require(value, "input_ids")
    ids = tuple(_list(value, "input_ids"))
    if not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise Malformed("field input_ids must be a list of token numbers; correct it")
    if value.get("labels") is not None:
        labels = _list(value, "labels")
        if len(labels) != len(ids):
            raise Malformed(
                f"labels has {len(labels)} entries and input_ids {len(ids)}; they must be as many"
            )
        for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (-100, token):
                raise Malformed(
                    f"labels[{at}]={label} is neither -100 nor input_ids[{at}]={token}; give labels unshifted"
                )
        return Tokens(ids, tuple(label != -100 for label in labels))
    mask = value.get("completion_mask")
    if mask is None:
        return Tokens(ids, (True,) * len(ids))
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(each in (0, 1) for each in mask):
        raise Malformed(f"completion_mask must hold 0 or 1 for each of the {len(ids)} tokens; correct it")
    return Tokens(ids, tuple(bool(each) for each in mask))


_READERS: dict[Format, Callable[[Mapping[str, object]], Row]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "tokens": _tokens,
}


def _message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise Malformed(f"{place} is a {type(value).__name__} where an object with role and content belongs")
    _require(value, "role", place=place)
    if value["role"] not in _ROLES:
        raise Malformed(f"{place}.role={value['role']!r} is unknown; use one of {', '.join(_ROLES)}")
    message = {name: content for name, content in value.items() if content is not None}
    content = message.get("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise Malformed(f"{place}.content has parts that are not text; only text is trained on")
        content = "".join(_unicode(part.get("text"), f"{place}.content") for part in content)
    message["content"] = _unicode(content, f"{place}.content")
    if message.get("weight", 1) not in (0, 1):
        raise Malformed(f"{place}.weight={message['weight']!r} must be 0 (not learnt) or 1")
    calls = message.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise Malformed(f"{place}.tool_calls is a {type(calls).__name__}, and it must be a list; correct it")
    if calls:
        message["tool_calls"] = [_call(each, f"{place}.tool_calls") for each in calls]
    elif value["role"] == "assistant":
        _require(value, "content", place=place)
    for name, content in message.items():
        if name != "content":
            _unicode_inside(content, f"{place}.{name}")
    return cast("Message", message)


def _tools(value: Mapping[str, object]) -> tuple[JsonObject, ...]:
    """Return the tools of a row in OpenAI's format; the field is a list or a list encoded as JSON text."""
    tools = value.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"field tools is not valid JSON ({error}); correct it") from None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Malformed("field tools must be a list of objects; correct it")
    _unicode_inside(tools, "tools")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
    )


def _calls(text: str, place: str) -> list[JsonObject]:
    """Parse the JSON of a ShareGPT `function_call` turn: one call or a list; empty text gives no calls."""
    if not text.strip():
        return []
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{place} is a function call and no valid JSON ({error}); correct it") from None
    _unicode_inside(calls, f"{place}.value")
    return [_call(each, place) for each in (calls if isinstance(calls, list) else [calls])]


def _call(value: Any, place: str) -> JsonObject:
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise Malformed(f"{place} holds a function call without name and arguments; correct it")
    arguments = call["arguments"]
    if isinstance(arguments, str):  # chat templates serialize objects and would quote a string a second time
        try:
            parsed = json.loads(arguments)
            arguments = ParsedArguments(parsed, arguments) if isinstance(parsed, dict) else parsed
        except (ValueError, RecursionError):
            arguments = call["arguments"]
    named = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _require(value: Mapping[str, object], *fields: str, place: str = "") -> None:
    for field in fields:
        if field not in value:
            name = f"{place}.{field}" if place else field
            raise Malformed(f"field {name} is missing (found: {_names(value)}); add it")


def _names(value: Mapping[str, object]) -> str:
    names = ", ".join(map(str, value)) or "nothing"
    return names.encode(errors="backslashreplace").decode()


def _list(value: Mapping[str, object], field: str) -> list[Any]:
    content = [] if value[field] is None else value[field]
    if not isinstance(content, list):
        raise Malformed(f"field {field} is a {type(content).__name__}, and it must be a list; correct it")
    return content


def _text(value: Mapping[str, object], field: str) -> str:
    content = value.get(field)
    return _unicode("" if content is None else content, field)


def _unicode(text: object, field: str) -> str:
    """Return the text if it is valid Unicode.

    JSON escapes can encode a lone surrogate, which tokenizers reject.

    Raises:
        Malformed: The value is not text, or contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise Malformed(f"field {field} is a {type(text).__name__}, and it must be text; write it in quotes")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(
            f"field {field} holds half of a surrogate pair, which is not a character; repair the escape"
        ) from None
    return text


def _unicode_inside(value: object, field: str) -> None:
    """Check all nested texts of a value with `_unicode`.

    Raises:
        Malformed: The value is not JSON, or one of its texts contains a lone surrogate.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"field {field} is not a JSON value ({error}); correct it") from None
    _unicode(text, field)
