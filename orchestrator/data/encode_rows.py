"""Parses and tokenizes rows, and separates the rows to train on from malformed and from empty rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.data.chat_template import Encoded, Template, encode
from orchestrator.data.columns import named_values
from orchestrator.data.formats import Malformed, RowFormat, parse
from orchestrator.data.readers import Block
from orchestrator.data.rows import Learnt, Row, empty_answers, nothing_to_learn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedRows:
    """The result of tokenizing consecutive rows; every field is indexed by position in the input.

    Attributes:
        encoded: Tokens of the rows to train on, ascending by position.
        malformed: Why a row is malformed.
        empty: Why a row has no trained tokens.
        partly_empty: Which answers of a row in `encoded` are empty.
    """

    encoded: dict[int, Encoded]
    malformed: dict[int, str]
    empty: dict[int, str]
    partly_empty: dict[int, str]


def encode_block(
    block: Block,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    learnt: Learnt,
) -> EncodedRows:
    """Give the rows of a block the field names of their format, and encode them; see `encode_values`."""
    values = list(named_values(block.values, block.columns, row_format))
    return encode_values(values, row_format, tokenizer, template, learnt)


def encode_values(
    values: Sequence[object],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
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
    result = EncodedRows({}, malformed, empty, {})
    encoded = encode(list(rows.values()), tokenizer, template, learnt != "answers")
    for (at, row), tokens in zip(rows.items(), encoded, strict=True):
        if isinstance(tokens, Malformed):
            malformed[at] = str(tokens)
        elif len(tokens.tokens) < 2 or not (learnt == "all" or tokens.turn[1:].any()):
            empty[at] = "no trained tokens"
        else:
            result.encoded[at] = tokens
            if learnt == "answers" and (lack := empty_answers(row)):
                result.partly_empty[at] = lack
    return result


def _rows(
    values: Sequence[object], row_format: RowFormat, learnt: Learnt
) -> tuple[dict[int, Row], dict[int, str], dict[int, str]]:
    """Return the rows to train on and the reasons of malformed and of empty rows, by position."""
    rows: dict[int, Row] = {}
    malformed: dict[int, str] = {}
    empty: dict[int, str] = {}
    for at, value in enumerate(values):
        try:
            row = parse(value, row_format)
        except Malformed as problem:
            malformed[at] = str(problem)
            continue
        if lack := nothing_to_learn(row, learnt):
            empty[at] = lack
        else:
            rows[at] = row
    return rows, malformed, empty
