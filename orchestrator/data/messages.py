"""Reads messages of conversations: spellings of roles and fields, content in parts, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.data.field_use import FieldUse
from orchestrator.data.learn_marks import MARKS, message_weight
from orchestrator.data.refused_rows import MEDIA
from orchestrator.data.row_values import (
    Malformed,
    has_value,
    names,
    require,
    require_unicode,
    unicode_text,
    yaml_key,
)
from orchestrator.data.rows import REASONING_FIELDS, Message
from orchestrator.data.tool_calls import calls_of, calls_of_message

_ROLES = ("system", "developer", "user", "assistant", "tool")
_PLAIN = {"role", "content"}
_CALL = "function_call"
_SPELLINGS = {
    **{role: role for role in _ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "chatbot", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys((_CALL, "tool_call", "function-call", "tool-call"), _CALL),
    **dict.fromkeys(("observation", "function_response", "tool_response", "function", "ipython"), "tool"),
}
# Fields of a message with its role and its text, the first that are both there.
_FIELDS = (
    ("role", "content"),
    ("from", "value"),
    ("role", "value"),
    ("from", "content"),
    ("role", "text"),
    ("from", "text"),
    ("user", "text"),
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_TEXTS = ("text", "value", "content")
_READ = frozenset(("role", "content", "tool_calls", "tool_call_id", "function_call", *MARKS, *MEDIA))


def read_messages(
    values: Sequence[object], field: str, use: FieldUse, fields: tuple[str, str] = ("role", "content")
) -> list[Message]:
    """Read the messages of a row.

    Args:
        values: The messages.
        field: Name of the row's field that holds them.
        use: Collects fields of messages that are not used.
        fields: Names of the role and the text of a message, for errors.

    Raises:
        Malformed: One of them is not a message.
    """
    return [_message(each, f"{field}[{at}]", field, use, fields) for at, each in enumerate(values)]


def _message(value: object, place: str, field: str, use: FieldUse, fields: tuple[str, str]) -> Message:
    if not isinstance(value, Mapping):
        wanted = f"an object with {fields[0]} and {fields[1]}"
        raise Malformed(f"{place} is a {type(value).__name__} where {wanted} belongs")
    if value.keys() == _PLAIN and value["role"] in _ROLES and isinstance(value["content"], str):
        return {"role": value["role"], "content": unicode_text(value["content"], f"{place}.content")}
    role_name, text_name = _names_of(value, fields)
    require(value, role_name, place=place)
    role = _role(value[role_name], f"{place}.{role_name}")
    rest = {
        name: content
        for name, content in value.items()
        if content is not None and name not in (role_name, text_name)
    }
    _require_no_media(rest, place)
    content = value.get(text_name)
    calls = calls_of_message(rest, place, use)
    if role == _CALL:
        calls = calls_of("" if content is None else content, place, use)
        require_unicode(calls, f"{place}.{text_name}")
        role, content = "assistant", ""
    elif not calls and (role_name == "from" or role == "assistant"):
        require(value, text_name, place=place)
    text, thought = _content(content, f"{place}.{text_name}", f"{field}.{text_name}", use)
    message: dict[str, Any] = {"role": role, "content": text}
    if calls is not None:
        message["tool_calls"] = calls
    if (weight := message_weight(rest, place)) is not None:
        message["weight"] = weight
    extra = {name: content for name, content in rest.items() if name not in MARKS and name != "function_call"}
    message = {**extra, **message, **_reasoning(extra, thought, role, place)}
    _require_unicode_fields(message, place)
    _note_fields(value, message, field, use, (role_name, text_name))
    return cast("Message", message)


def _names_of(value: Mapping[str, object], fields: tuple[str, str]) -> tuple[str, str]:
    for role_name, text_name in (fields, *_FIELDS):
        if role_name in value and text_name in value:
            return role_name, text_name
    if "role" in value:
        return "role", "content"
    return ("from", "value") if "from" in value else fields


def _role(value: object, place: str) -> str:
    role = _SPELLINGS.get(str(value).strip().lower()) if isinstance(value, str) else None
    if role is None:
        mapped = f", or data.train[].roles: {{{yaml_key(value)}: user}}" if isinstance(value, str) else ""
        raise Malformed(
            f"{place}={value!r} is unknown; use one of {', '.join(_ROLES)}, or another name of these such as "
            f"human, gpt, function_call and observation{mapped}"
        )
    return role


def _require_no_media(fields: Mapping[str, object], place: str) -> None:
    for name in MEDIA:
        if has_value(fields.get(name)):
            raise Malformed(f"{place} has the field {name}, and only text is trained on; remove the row")


def _content(content: object, place: str, field: str, use: FieldUse) -> tuple[str, str]:
    """Return the text and the reasoning of a message's content, which is text or a list of parts."""
    if content is None:
        return "", ""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return unicode_text(content, place), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for at, part in enumerate(content):
        is_thought, text = _part(part, f"{place}[{at}]", field, use)
        (thoughts if is_thought else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _part(part: object, place: str, field: str, use: FieldUse) -> tuple[bool, str]:
    """Return whether a part of a message's content is reasoning, and its text."""
    if isinstance(part, str):
        return False, unicode_text(part, place)
    if not isinstance(part, Mapping):
        raise Malformed(f"{place} is a {type(part).__name__} where a part with type and text belongs")
    kind = part.get("type") or "text"
    if kind not in (*_TEXT_PARTS, *_REASONING_PARTS):
        raise Malformed(
            f"{place} is a part of type {kind}, and only text is trained on; remove it or the row"
        )
    given = [name for name in (*_TEXTS, *_REASONING_PARTS) if part.get(name) is not None]
    if not given:
        found = names({name: each for name, each in part.items() if each is not None})
        raise Malformed(f"{place} is a part without text (found: {found}); add it, or remove the part")
    unused = {name for name, each in part.items() if has_value(each)} - {"type", given[0]}
    use.without_effect |= {f"{field}.{name}" for name in unused}
    # The field is that of the whole content, whose name readers of the row know.
    return kind in _REASONING_PARTS, unicode_text(part[given[0]], place.rpartition("[")[0])


def _reasoning(fields: Mapping[str, Any], thought: str, role: str, place: str) -> dict[str, str]:
    """Return the reasoning of an answer under every name by which templates read it.

    Templates of Qwen, DeepSeek and GLM read `reasoning_content`, those of gpt-oss `thinking`.
    """
    given = {name: fields[name] for name in REASONING_FIELDS if has_value(fields.get(name))}
    if role != "assistant" or not (given or thought):
        return {}
    texts = {unicode_text(text, f"{place}.{name}") for name, text in given.items()} | ({thought} - {""})
    if len(texts) > 1:
        where = ", ".join(given) + (" and parts of the content" if thought else "")
        raise Malformed(f"{place} has different reasoning in {where}; keep one of them")
    (text,) = texts
    return dict.fromkeys({"reasoning_content": 0, "thinking": 0, **dict.fromkeys(given, 0)}, text)


def _require_unicode_fields(message: Mapping[str, object], place: str) -> None:
    for name, content in message.items():
        if name not in ("role", "content", "weight"):
            require_unicode(content, f"{place}.{name}")


def _note_fields(
    value: Mapping[str, Any],
    message: Mapping[str, Any],
    field: str,
    use: FieldUse,
    fields: tuple[str, str],
) -> None:
    """Note the fields of a message that are not used, or only by some chat templates."""
    is_answer = message["role"] == "assistant"
    for name in value.keys() - set(fields):
        if not has_value(value[name]):
            continue
        if name in ("role", "content") or (name in MARKS and not is_answer and message.get("weight")):
            use.without_effect.add(f"{field}.{name}")
        elif name in REASONING_FIELDS and is_answer:
            use.for_template[f"{field}.{name}"] = REASONING_FIELDS
        elif name not in _READ:
            use.for_template[f"{field}.{name}"] = (name,)
