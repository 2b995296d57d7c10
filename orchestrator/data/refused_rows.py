"""Refuses rows that training cannot follow: preferences, bad answers, weights of rows, images and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.data.learn_marks import LEARN
from orchestrator.data.row_values import Malformed, has_value

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCES = frozenset(
    (
        "chosen", "chosen_response", "preferred_output",
        "rejected", "rejected_response", "rejected_responses", "rejected_messages", "rejected_answer",
        "rejected_output", "rejected_completion", "non_preferred_output",
    )
)  # fmt: skip
_VERDICTS = ("label", "kto_tag")
_WEIGHTS = ("weight", "loss_weight", "sample_weight")
_MARKS = frozenset((*LEARN, *_WEIGHTS))
_CHECKED = frozenset((*MEDIA, *_VERDICTS, *_MARKS, "masked", "mask"))


def require_no_preference(row: Mapping[str, Any]) -> None:
    """Check that a row does not have a good and a bad answer.

    Raises:
        Malformed: It has one of them.
    """
    if _PREFERENCES.isdisjoint(row):
        return
    # A number or a bool under such a name is a score, not an answer.
    found = [name for name in row if name in _PREFERENCES and isinstance(row[name], str | list | dict)]
    if found := [name for name in found if row[name]]:
        raise Malformed(
            f"the row is a preference (it has {', '.join(found)}), and this trains on answers, not on "
            "preferences; name the good answer and leave out the other with data.train[].columns, such as "
            "{chosen: messages, rejected: null}, or remove the row"
        )


def require_trainable(row: Mapping[str, Any], has_answers: bool) -> None:
    """Check that a row is text alone, and is not marked as a bad answer or one that is not learnt.

    Args:
        row: The row.
        has_answers: False for a row of plain text, whose marks are about something else.

    Raises:
        Malformed: A field says otherwise.
    """
    if _CHECKED.isdisjoint(row):
        return
    _require_no_media(row)
    if has_answers:
        _require_good_answer(row)
        _require_no_weight(row)


def _require_no_media(row: Mapping[str, Any]) -> None:
    for name in MEDIA:
        if has_value(row.get(name)):
            raise Malformed(
                f"the row has the field {name}, and only text is trained on; remove the row, or leave out "
                f"the field with data.train[].columns: {{{name}: null}}"
            )


def _require_good_answer(row: Mapping[str, Any]) -> None:
    for name in _VERDICTS:
        # A label that is text is more often the class of a text; `kto_tag` has one meaning.
        if row.get(name) is False or (name == "kto_tag" and str(row.get(name)).lower() in ("false", "0")):
            raise Malformed(
                f"field {name} is false: the answer is a bad one, and this trains on answers, not on "
                "preferences; remove the row"
            )


def _require_no_weight(row: Mapping[str, Any]) -> None:
    for name in sorted(_MARKS & row.keys()):
        value = row[name]
        is_zero = isinstance(value, int if name not in _WEIGHTS else (int, float)) and value == 0
        if is_zero:  # False equals 0; a loss of 0.0 may be a measurement
            raise Malformed(f"field {name} is {value}: the row is not to be learnt; remove it")
        if name in _WEIGHTS and isinstance(value, int | float) and value != 1:
            raise Malformed(
                f"field {name} is {value}, and rows have no weight; weigh whole sources "
                "(data.train[].weight), or remove the field"
            )
    if row.get("masked") is True:
        raise Malformed("field masked is true: the row is not to be learnt; remove it")
    mask = row.get("mask")
    if isinstance(mask, str) and mask.strip().lower() in ("assistant", "gpt", "model"):
        raise Malformed(f"field mask={mask} says that answers are not learnt; remove the field or the row")
