"""Helpers for tests of what is learnt of a row, through the whole path that training takes."""

import json
from typing import Any

from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.chat_template import choose
from orchestrator.data.columns import RowNames
from orchestrator.data.formats import RowFormat
from orchestrator.data.row_view import RowView, view_row


def view(
    row: object,
    tokenizer: Any,
    row_format: RowFormat = "auto",
    columns: dict[str, str | None] | None = None,
    roles: dict[str, str] | None = None,
    **data: Any,
) -> RowView:
    """The view of a row in a job with these fields of `data`."""
    spec = DataSpec(train=(SourceSpec(path="rows.jsonl"),), **data)
    value = row if isinstance(row, bytes) else json.dumps(row).encode()
    return view_row(
        value,
        row_format,
        spec,
        tokenizer,
        choose(spec, ModelSpec(path="builtin/tiny-llama"), tokenizer),
        RowNames(columns or {}, roles or {}),
    )


def text_and_learnt(row: object, tokenizer: Any, **data: Any) -> tuple[str, list[str]]:
    """What the model reads of a row that is trained on, and the pieces that are scored."""
    found = view(row, tokenizer, **data)
    assert found.left_out is None, found.left_out
    return found.text_read, found.learnt_pieces
