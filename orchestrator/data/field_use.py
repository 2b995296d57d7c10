"""Fields of rows that training does not depend on, counted by name so that none is ignored in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from orchestrator.data.rows import REASONING_FIELDS


@dataclass
class FieldUse:
    """Collects the fields with a value of one row that its tokens may not depend on.

    Attributes:
        without_effect: Names of fields that are not used, such as `source` and `messages.tool_calls.index`.
        for_template: Fields of messages that only some chat templates read: the name, such as
            `messages.name`, and the words by which a template reads it.
    """

    without_effect: set[str] = field(default_factory=set)
    for_template: dict[str, tuple[str, ...]] = field(default_factory=dict)


def fields_without_effect(
    use: FieldUse, chat_template: object, has_effect: Callable[[str], bool]
) -> set[str]:
    """Return the names of the fields that a row's tokens do not depend on.

    Args:
        use: Unused fields of the row.
        chat_template: Source of the template that renders it, by name if there are several; None for none.
        has_effect: Whether the text depends on a field of messages, given its name. Called only for names
            that the template has, which may be those of a field of something else, such as `tool.name`.
    """
    if not use.for_template:
        return use.without_effect
    source = str(chat_template)
    return use.without_effect | {
        name
        for name, words in use.for_template.items()
        if not any(_has_name(word, source) for word in words)
        or (words != REASONING_FIELDS and not has_effect(name.rpartition(".")[2]))
    }


@lru_cache(maxsize=1024)
def _has_name(word: str, source: str) -> bool:
    """Return whether a template has an attribute or key of this name, such as `message.name`."""
    return bool(re.search(rf"(\.\s*|['\"]){re.escape(word)}\b", source))
