"""Recognizes conversations by the keys of their messages, and gives them those of messages or ShareGPT."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import get_args

from orchestrator.config.field_types import TurnField
from orchestrator.data.formats import Malformed

FIELDS = frozenset(get_args(TurnField))
_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "chat", "turns")
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text", "utterance")
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"))


def are_turns(value: Sequence[object], columns: Mapping[str, str] = {}) -> bool:
    """Return whether a list is a conversation: objects with a role and a text, whatever their keys.

    Args:
        value: The list.
        columns: Fields of messages by key, from `columns` of the source.
    """
    return bool(value) and all(isinstance(each, Mapping) and _is_turn(each, columns) for each in value)


def keys_of(columns: Mapping[str, str | None]) -> dict[str, str]:
    """Return the part of `SourceSpec.columns` that concerns the keys of messages."""
    return {name: field for name, field in columns.items() if field is not None and field in FIELDS}


def list_from_text(text: str, field: str) -> list[object]:
    """Parse a list that is stored as text: JSON, or Python's notation, which pandas writes to CSV files.

    Raises:
        Malformed: The text is neither.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if not isinstance(value, list):
        raise Malformed(f"field {field} is text, and it must be a list; write the list as JSON")
    return value


def with_messages(
    row: Mapping[str, object], columns: Mapping[str, str], roles: Mapping[str, str]
) -> Mapping[str, object]:
    """Return a row with its conversation in `messages` or `conversations`, if it has one.

    Args:
        row: The row.
        columns: Fields of messages by key, from `columns` of the source.
        roles: `SourceSpec.roles`.

    Raises:
        Malformed: Several fields hold a conversation, or the keys of its messages are not known.
    """
    names = [name for name in row if str(name).strip().lower() in _NAMES]
    lists = {name: each for name in names if (each := _list(row[name], str(name))) is not None}
    if not lists:
        return {name: each for name, each in row.items() if each != "" or name not in names}
    exact = [name for name in ("messages", "conversations") if name in lists]
    if not exact and len(lists) > 1:
        first, second = list(lists)[:2]
        raise Malformed(
            f"the fields {', '.join(lists)} could each be the messages; choose one with columns: "
            f"{{{first}: messages, {second}: null}}"
        )
    name = exact[0] if exact else next(iter(lists))
    if name not in ("messages", "conversations") and not are_turns(lists[name], columns):
        return row
    others = {key: content for key, content in row.items() if key != name}
    field, messages = _normalized(lists[name], name, columns)
    if roles:
        key = "from" if field == "conversations" else "role"
        messages = [_with_role(each, key, roles) for each in messages]
    return {**others, field: messages}


def _list(value: object, name: str) -> list[object] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        return list_from_text(value, name)
    return value if isinstance(value, list) else None


def _normalized(
    messages: Sequence[object], name: str, columns: Mapping[str, str]
) -> tuple[str, Sequence[object]]:
    """Return the field of a conversation and its messages, with the keys of that field's format."""
    if columns:
        messages = [_renamed(each, columns) if isinstance(each, Mapping) else each for each in messages]
    first = next((each for each in messages if isinstance(each, Mapping)), None)
    if first is None:
        return ("conversations" if name == "conversations" else "messages"), messages
    if pair := _pair_of(first):
        return "messages", [message for each in messages for message in _unpaired(each, pair)]
    role, content = _key(first, _ROLE_KEYS), _key(first, _CONTENT_KEYS)
    if role is None and content is None and len(first) > 1:
        keys = list(map(str, first))
        raise Malformed(
            f"{name}[0] has the fields {', '.join(keys)}, and none of them is known as role or content; name "
            f"them with columns: {{{keys[0]}: role, {keys[1]}: content}}"
        )
    if role == "from" and content in ("value", None):
        return "conversations", messages
    keys_of = {key: field for key, field in ((role, "role"), (content, "content")) if key and key != field}
    if not keys_of:
        return "messages", messages
    return "messages", [_renamed(each, keys_of) if isinstance(each, Mapping) else each for each in messages]


def _with_role(message: object, key: str, roles: Mapping[str, str]) -> object:
    if not isinstance(message, Mapping):
        return message
    role = message.get(key)
    return {**message, key: roles[role]} if isinstance(role, str) and role in roles else message


def _renamed(message: Mapping[str, object], keys: Mapping[str, str]) -> dict[str, object]:
    renamed = {keys[key]: value for key, value in message.items() if key in keys}
    return {**{key: value for key, value in message.items() if key not in keys}, **renamed}


def _is_turn(message: Mapping[str, object], columns: Mapping[str, str]) -> bool:
    if columns:
        message = _renamed(message, columns)
    role = _key(message, _ROLE_KEYS)
    has_content = _key(message, _CONTENT_KEYS) is not None or "tool_calls" in message
    return (role is not None and has_content) or _pair_of(message) is not None


def _key(message: Mapping[str, object], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in message), None)


def _pair_of(message: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the keys of an object that holds a question and its answer, such as human and assistant."""
    return next((pair for pair in _PAIRS if pair[0] in message and pair[1] in message), None)


def _unpaired(message: object, pair: tuple[str, str]) -> list[object]:
    if not isinstance(message, Mapping):
        return [message]
    parts = zip(("system", "user", "assistant"), ("system", *pair), strict=True)
    return [{"role": role, "content": message[key]} for role, key in parts if message.get(key) is not None]
