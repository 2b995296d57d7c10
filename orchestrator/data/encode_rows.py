"""Parses and tokenizes rows, and separates the rows to train on from malformed and from empty rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.data.chat_template import Encoded, Template, TemplateName, encode
from orchestrator.data.columns import named_values
from orchestrator.data.conversation import FEW_TOKENS, ChatSettings, conversation_template
from orchestrator.data.field_use import fields_without_effect
from orchestrator.data.formats import ReadRow, RowFormat, read
from orchestrator.data.readers import Block
from orchestrator.data.row_values import Malformed
from orchestrator.data.rows import Conversation, Learnt, Row, empty_answers, nothing_to_learn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FEW = 3


@dataclass(frozen=True)
class EncodedRows:
    """The result of tokenizing consecutive rows, by position in the input.

    Attributes:
        encoded: Tokens of the rows to train on, ascending by position.
        malformed: Why a row is malformed.
        empty: Why a row has no trained tokens.
        partly_empty: Which answers of a row in `encoded` are empty.
        fields_without_effect: Number of rows in `encoded` that have a field which is not used, by its name.
    """

    encoded: dict[int, Encoded]
    malformed: dict[int, str]
    empty: dict[int, str]
    partly_empty: dict[int, str]
    fields_without_effect: Counter[str]


def encode_block(
    block: Block,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | TemplateName,
    learnt: Learnt,
) -> EncodedRows:
    """Give the rows of a block the field names of their format, and encode them; see `encode_values`."""
    values = list(named_values(block.values, block.names, row_format))
    return encode_values(values, row_format, tokenizer, template, learnt)


def encode_values(
    values: Sequence[object],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | TemplateName,
    learnt: Learnt,
) -> EncodedRows:
    """Parse and tokenize rows without truncation, and tell the rows to train on from the others.

    Args:
        values: The rows with the field names of their format: JSON as bytes, parsed values, or why a row is
            malformed.
        row_format: Their format.
        tokenizer: The model's tokenizer.
        template: The result of `choose`.
        learnt: Which tokens may be trained.
    """
    rows, malformed, empty = _rows(values, row_format, learnt)
    result = EncodedRows({}, malformed, empty, {}, Counter())
    encoded = encode([each.row for each in rows.values()], tokenizer, template, learnt != "answers")
    for (at, each), tokens in zip(rows.items(), encoded, strict=True):
        if isinstance(tokens, Malformed):
            malformed[at] = str(tokens)
        elif len(tokens.tokens) < 2 or not (learnt == "all" or tokens.turn[1:].any()):
            empty[at] = "no trained tokens"
        else:
            if learnt != "all" and np.count_nonzero(tokens.turn[1:]) < _FEW:
                tokens = replace(tokens, notes=(*tokens.notes, FEW_TOKENS))
            result.encoded[at] = tokens
            if each.use.without_effect or each.use.for_template:
                has_effect = partial(_has_effect, each.row, tokenizer, template)
                result.fields_without_effect.update(
                    fields_without_effect(each.use, tokenizer.chat_template, has_effect)
                )
            if learnt == "answers" and (lack := empty_answers(each.row)):
                result.partly_empty[at] = lack
    return result


def _has_effect(
    row: Row, tokenizer: PreTrainedTokenizerFast, template: Template | TemplateName, field: str
) -> bool:
    """Return whether the text of a row depends on a field of its messages."""
    settings = ChatSettings() if isinstance(template, str) else template.settings
    return isinstance(row, Conversation) and conversation_template(tokenizer, settings).depends_on(row, field)


def _rows(
    values: Sequence[object], row_format: RowFormat, learnt: Learnt
) -> tuple[dict[int, ReadRow], dict[int, str], dict[int, str]]:
    """Return the rows to train on and the reasons of malformed and of empty rows, by position."""
    rows: dict[int, ReadRow] = {}
    malformed: dict[int, str] = {}
    empty: dict[int, str] = {}
    for at, value in enumerate(values):
        try:
            row = read(value, row_format)
        except Malformed as problem:
            malformed[at] = str(problem)
            continue
        if lack := nothing_to_learn(row.row, learnt):
            empty[at] = f"field {row.null} is null" if row.null else lack
        else:
            rows[at] = row
    return rows, malformed, empty
