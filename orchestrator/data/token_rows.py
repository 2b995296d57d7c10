"""Reads rows that are already tokenized."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.data.row_values import Malformed, list_of, require
from orchestrator.data.rows import Tokens

# The names that TRL and other trainers give to a list with 1 for each token to learn.
_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
TOKEN_FIELDS = frozenset(("input_ids", "labels", "attention_mask", *_MASKS))


def read_tokens(value: Mapping[str, object]) -> Tokens:
    """Read a row of token ids; `labels` or a mask says which are trained, and otherwise all are.

    Raises:
        Malformed: The row has no list of token ids, or labels or a mask that do not fit it.
    """
    require(value, "input_ids")
    ids = tuple(list_of(value, "input_ids"))
    if not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise Malformed("field input_ids must be a list of token numbers; correct it")
    if value.get("attention_mask") is not None and not all(list_of(value, "attention_mask")):
        raise Malformed("attention_mask has 0 for padding, which rows must not have; remove these tokens")
    if value.get("labels") is not None:
        return Tokens(ids, _by_labels(ids, list_of(value, "labels")))
    for name in _MASKS:
        if value.get(name) is not None:
            return Tokens(ids, _by_mask(ids, name, value[name]))
    return Tokens(ids, (True,) * len(ids))


def _by_labels(ids: tuple[int, ...], labels: list[object]) -> tuple[bool, ...]:
    if len(labels) != len(ids):
        raise Malformed(f"labels has {len(labels)} entries and input_ids {len(ids)}; they must be as many")
    for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (-100, token):
            raise Malformed(
                f"labels[{at}]={label} is neither -100 nor input_ids[{at}]={token}; give labels unshifted"
            )
    return tuple(label != -100 for label in labels)


def _by_mask(ids: tuple[int, ...], name: str, mask: object) -> tuple[bool, ...]:
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(each in (0, 1) for each in mask):
        raise Malformed(f"{name} must hold 0 or 1 for each of the {len(ids)} tokens; correct it")
    return tuple(bool(each) for each in mask)
