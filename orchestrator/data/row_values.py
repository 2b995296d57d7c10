"""Checks of the values in a row: text, lists and nested values, with errors that name the field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


class Malformed(ValueError):
    """A row does not match its format; the message names the reason and the fix."""


def has_value(content: object) -> bool:
    """Return whether a field has a value; null, empty text and empty lists and objects are none."""
    return content is not None and content not in ("", [], {}, ())


def require(value: Mapping[str, object], *fields: str, place: str = "") -> None:
    """Check that an object has fields, whatever their values.

    Args:
        value: The object.
        fields: Names of the fields.
        place: Path of the object in its row, such as `messages[0]`.

    Raises:
        Malformed: A field is missing.
    """
    for name in fields:
        if name not in value:
            path = f"{place}.{name}" if place else name
            raise Malformed(f"field {path} is missing (found: {names(value)}); add it")


def names(value: Mapping[str, object]) -> str:
    """Return the names of the fields of an object, for messages."""
    text = ", ".join(map(str, value)) or "nothing"
    return text.encode(errors="backslashreplace").decode()


def list_of(value: Mapping[str, object], name: str) -> list[Any]:
    """Return the list in a field; a null is an empty list.

    Raises:
        Malformed: The value is not a list.
    """
    content = [] if value[name] is None else value[name]
    if not isinstance(content, list):
        raise Malformed(f"field {name} is a {type(content).__name__}, and it must be a list; correct it")
    return content


def text_of(value: Mapping[str, object], name: str) -> str:
    """Return the text in a field; a null or a missing field is an empty text.

    Raises:
        Malformed: The value is not text, or contains a lone surrogate.
    """
    content = value.get(name)
    return unicode_text("" if content is None else content, name)


def unicode_text(text: object, name: str) -> str:
    """Return the text if it is valid Unicode.

    JSON escapes can encode a lone surrogate, which tokenizers reject.

    Raises:
        Malformed: The value is not text, or contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise Malformed(f"field {name} is a {type(text).__name__}, and it must be text; write it in quotes")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(
            f"field {name} holds half of a surrogate pair, which is not a character; repair the escape"
        ) from None
    return text


def require_unicode(value: object, name: str) -> None:
    """Check all nested texts of a value with `unicode_text`.

    Raises:
        Malformed: The value is not JSON, or one of its texts contains a lone surrogate.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"field {name} is not a JSON value ({error}); correct it") from None
    unicode_text(text, name)


def from_json(text: str, name: str) -> Any:
    """Parse JSON text in a field.

    Raises:
        Malformed: The text is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"field {name} is not valid JSON ({error}); correct it") from None


def yaml_key(name: str) -> str:
    """Return a name as the key of a mapping in YAML, in quotes where it needs them."""
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name)
