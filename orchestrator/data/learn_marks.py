"""Marks of a row that say what not to learn, under the names that other trainers use.

OpenAI marks messages with `weight`, ms-swift and XTuner with `loss`, ChatGLM3 with `loss_mask`, axolotl with
`train` or `training`, torchtune with `masked`. KTO rows say with `label` or `kto_tag` whether the answer is a
good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.row_values import Malformed

LEARN = ("weight", "loss", "loss_mask", "loss_weight", "loss_scale", "train", "training", "trainable")
_LEAVE = ("masked",)
_PARTS = ("train_detail", "training_detail")
MARKS = frozenset((*LEARN, *_LEAVE, *_PARTS, "mask"))
LISTS = ("weight", "weights", "loss", "loss_mask", "loss_weight", "loss_scale", "train", "training")
"""Fields of a row of messages that may hold a list with a weight for each message."""


def message_weight(message: Mapping[str, Any], place: str) -> int | None:
    """Return 0 if a mark of a message says that it is not learnt, 1 if marks say that it is, else None.

    Args:
        message: Fields of the message.
        place: Its path in the row, such as `messages[0]`.

    Raises:
        Malformed: A mark is a fraction, not a number, marks a part of the message, or may mean either.
    """
    weights = []
    for name in sorted(MARKS & message.keys()):
        value = message[name]
        if value is None:
            continue
        if name in _PARTS:
            raise Malformed(
                f"{place}.{name} marks parts of a message, which are not told apart; use weight: 0 for a "
                "message that is not learnt, or split the message"
            )
        if name == "mask":
            raise Malformed(
                f"{place}.mask={value!r} may mean that the message is learnt, or that it is not; write "
                "weight: 0 (not learnt) or weight: 1"
            )
        weights.append(_weight(value, f"{place}.{name}") ^ (name in _LEAVE))
    return min(weights, default=None)


def _weight(value: object, name: str) -> int:
    if isinstance(value, int | float) and value in (0, 1):
        return int(value)
    rule = "must be 0 (not learnt) or 1"
    if isinstance(value, float | int):
        rule += "; weigh whole sources instead (data.train[].weight), or round it"
    raise Malformed(f"{name}={value!r} {rule}")


def row_weights(row: Mapping[str, Any], answers: Sequence[bool]) -> list[int] | None:
    """Return the weight of each message from a list that the row gives, such as `loss_mask: [0, 1]`.

    Args:
        row: The row.
        answers: Whether each message is an answer. The list has an entry per message or per answer.

    Returns:
        The weight of each message; None if the row has no such list.

    Raises:
        Malformed: The list has another length, or an entry that is not 0 or 1.
    """
    for name in LISTS:
        marks = row.get(name)
        if not isinstance(marks, list) or not marks:
            continue
        if len(marks) not in (len(answers), sum(answers)):
            raise Malformed(
                f"field {name} has {len(marks)} entries for {len(answers)} messages, {sum(answers)} of them "
                "answers; give one for each message or for each answer"
            )
        weights = iter([_weight(each, f"{name}[{at}]") for at, each in enumerate(marks)])
        if len(marks) == len(answers):
            return list(weights)
        return [next(weights) if is_answer else 1 for is_answer in answers]
    return None
