"""Shows rows as training reads them: their text token by token, and which tokens are targets of the loss.

Rows take the same path as in `orchestrator.data.tokenize` (parse, render, encode, truncate), in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from orchestrator.config.schema import DataSpec
from orchestrator.data.chat_template import Encoded, Template, encode, render
from orchestrator.data.columns import RowNames, named_values
from orchestrator.data.corpus import document_parts
from orchestrator.data.encode_rows import EncodedRows, encode_values
from orchestrator.data.formats import Malformed, RowFormat, parse
from orchestrator.data.rows import Conversation, Instruction, Row, Tokens, learnt_of
from orchestrator.data.token_cache import is_trained, row_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LONGEST_RAW = 500  # characters of a row that could not be tokenized


@dataclass(frozen=True)
class VisibleText:
    """A tokenized row with its text.

    Attributes:
        text: What the model reads, including special tokens.
        spans: First and last (exclusive) character of each token in `text`, shape [tokens, 2]. Tokens that
            share a character, such as the bytes of an emoji, have equal spans.
        encoded: The tokens and their labels.
    """

    text: str
    spans: npt.NDArray[np.int64]
    encoded: Encoded


@dataclass(frozen=True)
class RowView:
    """One row as training reads it.

    Attributes:
        source: Name of the data file in messages.
        unit: What `line` counts: `line` or `row`.
        line: Line or row number, from 1.
        template: Template that rendered the row; `none` for plain text and tokenized rows.
        text: The whole row before truncation; empty if it could not be tokenized.
        spans: Characters of each token in `text`, shape [tokens, 2].
        ids: Token ids, shape [tokens].
        special: Whether a token is a special token, shape [tokens].
        kept: Whether a token is in a document after truncation, shape [tokens].
        learnt: Whether a token is a target of the loss, shape [tokens].
        starts: First token of each document; more than one with `truncation: split`.
        left_out: Why the row is not trained on; None if it is.
        note: Empty answers, fields that have no effect, and names in `conversation.NOTES`; None for nothing.
        raw: The start of the row as it is in the file, if it could not be tokenized.
        content_hash: Equal for rows that `data.deduplicate` takes for equal; None if the row is left out.
    """

    source: str
    unit: str
    line: int
    template: str
    text: str
    spans: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint32]
    special: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    learnt: npt.NDArray[np.bool_]
    starts: tuple[int, ...] = ()
    left_out: str | None = None
    note: str | None = None
    raw: str = ""
    content_hash: int | None = None

    def leave_out(self, reason: str) -> RowView:
        """Return the view of the row as one that is not trained on."""
        none = np.zeros_like(self.kept)
        return replace(self, kept=none, learnt=none, starts=(), left_out=reason)

    def with_note(self, note: str) -> RowView:
        """Return the view with a further note."""
        return replace(self, note=f"{self.note}; {note}" if self.note else note)

    @property
    def learnt_pieces(self) -> list[str]:
        """Texts of the runs of consecutive tokens that are targets of the loss, in order."""
        return [self._slice(first, stop) for first, stop in _runs(self.learnt)]

    @property
    def text_read(self) -> str:
        """The text after truncation; the whole text of a row that is left out."""
        if self.left_out:
            return self.text
        return "".join(self._slice(first, stop) for first, stop in _runs(self.kept))

    def as_json(self) -> dict[str, object]:
        """Return the entry of `rows_shown`."""
        return {
            "source": self.source,
            "line": self.line,
            "text": self.text_read,
            "learnt": self.learnt_pieces,
            "tokens": int(self.kept.sum()) if self.left_out is None else len(self.ids),
            "learnt_tokens": int(self.learnt.sum()),
            "tokens_truncated": int((~self.kept).sum()) if self.left_out is None else 0,
            "template": self.template,
            "left_out": self.left_out,
            "note": self.note,
        }

    def _slice(self, first: int, stop: int) -> str:
        return self.text[int(self.spans[first, 0]) : int(self.spans[first:stop, 1].max())]


def view_row(
    value: object,
    row_format: RowFormat,
    data: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    names: RowNames = RowNames(),
) -> RowView:
    """Return the view of one row, without its file and line.

    Args:
        value: The row: JSON as bytes, or a parsed value.
        row_format: Its format.
        data: Gives loss_on, empty_answers, max_length and truncation.
        tokenizer: The model's tokenizer.
        template: Template of instruction rows.
        names: Names that the source has for fields and roles.
    """
    learnt = learnt_of(data)
    (named,) = named_values([value], names, row_format)
    outcome = encode_values([named], row_format, tokenizer, template, learnt)
    left_out = next(
        (
            f"{kind}: {reasons[0]}"
            for kind, reasons in (("malformed", outcome.malformed), ("empty", outcome.empty))
            if reasons
        ),
        None,
    )
    try:
        row = parse(named, row_format)
        visible = encode_visible(row, tokenizer, template, learnt != "answers")
    except Malformed:
        raw = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
        return _unreadable(raw[:_LONGEST_RAW] + "…" * (len(raw) > _LONGEST_RAW), left_out)
    view = replace(
        _unreadable("", left_out),
        template=_template_name(row, template),
        text=visible.text,
        spans=visible.spans,
        ids=visible.encoded.tokens,
        special=np.isin(visible.encoded.tokens, tokenizer.all_special_ids),
        note=_note(outcome),
        content_hash=row_hash(outcome.encoded[0]) if outcome.encoded else None,
    )
    return _truncated(view, visible.encoded, data)


def _note(outcome: EncodedRows) -> str | None:
    unused = ", ".join(sorted(outcome.fields_without_effect))
    noted = ", ".join(name for row in outcome.encoded.values() for name in row.notes)
    notes = [
        *outcome.partly_empty.values(),
        *([f"fields without effect: {unused}"] if unused else []),
        *([f"noted: {noted}"] if noted else []),
    ]
    return "; ".join(notes) or None


def encode_visible(
    row: Row, tokenizer: PreTrainedTokenizerFast, template: Template, learn_ends: bool = False
) -> VisibleText:
    """Tokenize a row as `encode` does, and return its text with the characters of every token.

    Args:
        row: The row.
        tokenizer: A fast Hugging Face tokenizer.
        template: Template of instruction rows.
        learn_ends: See `orchestrator.data.chat_template.render`.

    Raises:
        Malformed: The row cannot be tokenized.
    """
    (encoded,) = encode([row], tokenizer, template, learn_ends)
    if isinstance(encoded, Malformed):
        raise encoded
    if not isinstance(row, Tokens):
        rendered = render(row, template, tokenizer, learn_ends)
        encoding = tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False)
        added = len(encoded.tokens) - len(encoding.ids)  # tokens before the text, such as <s>
        if added >= 0 and encoded.tokens[added:].tolist() == encoding.ids:
            before = _token_texts(encoded.tokens[:added].tolist(), tokenizer)
            return _visible(before, rendered.text, encoding.offsets, encoded)
    return _visible(_token_texts(encoded.tokens.tolist(), tokenizer), "", [], encoded)


def _visible(
    before: Sequence[str], text: str, offsets: Sequence[tuple[int, int]], encoded: Encoded
) -> VisibleText:
    """Put the texts of single tokens before a text whose tokens have offsets."""
    ends = np.cumsum([0, *map(len, before)])
    spans = np.concatenate(
        [
            np.stack([ends[:-1], ends[1:]], axis=1),
            np.array(offsets, np.int64).reshape(-1, 2) + ends[-1],
        ]
    )
    return VisibleText("".join(before) + text, spans, encoded)


def _token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Decode tokens one by one; a character of several tokens belongs to the last of them."""
    texts: list[str] = []
    # Decoded with the tokens before it, because decoders strip the leading space of a first token.
    context, done = 0, 0
    for at in range(len(ids)):
        before, after = (_decode(tokenizer, ids[context:stop]) for stop in (done, at + 1))
        is_whole = len(after) > len(before) and (not after.endswith("\ufffd") or at + 1 == len(ids))
        texts.append(after[len(before) :] if is_whole else "")
        if is_whole:
            context, done = done, at + 1
    return texts


def _decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _truncated(view: RowView, encoded: Encoded, data: DataSpec) -> RowView:
    """Fill in which tokens are kept and learnt, and why a row that could be tokenized is dropped."""
    count = len(encoded.tokens)
    kept, learnt = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    starts = []
    _, firsts, lengths = document_parts(np.array([count]), data)
    for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
        trained = is_trained(encoded.turn[first : first + length], data.loss_on)
        if trained.any() and not view.left_out:  # a document without trained tokens is dropped
            kept[first : first + length] = True
            learnt[first : first + length] = trained
            starts.append(first)
    left_out = view.left_out
    if not (left_out or starts):
        setting = f"max_length={data.max_length}, truncation={data.truncation}, loss_on={data.loss_on}"
        has_parts = len(firsts) > 0
        left_out = f"dropped: {'no trained token' if has_parts else f'{count} tokens'} with {setting}"
    return replace(view, kept=kept, learnt=learnt, starts=tuple(starts), left_out=left_out)


def _template_name(row: Row, template: Template) -> str:
    if not isinstance(row, Conversation | Instruction):
        return "none"
    if isinstance(row, Instruction) and template.name == "alpaca":
        return "alpaca"
    chosen = template.chosen.split("\n")[0][:60]
    return "chat template of the tokenizer" if chosen in ("auto", "chat", "alpaca") else chosen


def _unreadable(raw: str, left_out: str | None) -> RowView:
    none = np.zeros(0, np.bool_)
    spans = np.zeros((0, 2), np.int64)
    return RowView(
        "", "line", 0, "none", "", spans, none.astype(np.uint32), none, none, none, (), left_out, None, raw
    )


def _runs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last (exclusive) index of each run of true values."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from list(pairwise(borders.tolist()))[::2]
