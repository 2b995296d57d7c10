"""Select the documents of an epoch: rows of each source by sample, repeat and weight, cut to max_length.

This works on the index of the token stores; tokens are read only to count trained tokens of truncated rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.packing import Pieces
from orchestrator.data.row_selection import ALL_ROWS, Split, select_rows
from orchestrator.data.token_cache import LossOn, TokenStore, is_trained
from orchestrator.errors import SpecError

Int64Array = npt.NDArray[np.int64]
_BY_NAME = ("fields_without_effect", "notes")
_FROM_MANIFEST = ("rows_malformed", "rows_empty", "rows_partly_empty", *_BY_NAME)


@dataclass(frozen=True)
class Document:
    """One document of a pack.

    Attributes:
        tokens: Token ids, uint32, shape [length].
        trained: Whether the token is a target of the loss, bool, shape [length]. The first token never is.
    """

    tokens: npt.NDArray[np.uint32]
    trained: npt.NDArray[np.bool_]


class Documents(Protocol):
    """Random access to documents, and their lengths."""

    @property
    def lengths(self) -> Int64Array:
        """Tokens of each document, shape [documents]."""

    @property
    def trained(self) -> Int64Array:
        """Trained tokens of each document, shape [documents]."""

    def document(self, number: int) -> Document:
        """Return one document."""


@dataclass(frozen=True)
class TokenCounts:
    """Rows and tokens of an epoch: read, kept, truncated and dropped.

    tokens_read = tokens_kept + tokens_truncated + tokens_dropped. A row that is read twice counts twice.
    `rows_in_files` counts each row once; sample, repeat and weight select from rows_in_files - rows_malformed
    - rows_empty, and with data.deduplicate - rows_duplicate. Held-out rows are not read by training.

    Attributes:
        rows: Rows read.
        documents: Documents in packs; a split row gives several.
        tokens_read: Tokens of the rows read.
        tokens_kept: Tokens in packs.
        tokens_truncated: Tokens removed from rows that are partly kept.
        tokens_dropped: Tokens of rows and parts that are dropped.
        rows_truncated: Rows that lost their start or end.
        rows_dropped: Rows that are too long for truncation: drop, or have no trained token.
        rows_split: Rows split into several documents.
        rows_malformed: Malformed rows in the files; otherwise counted only in rows_in_files.
        trained_tokens: Tokens that are targets of the loss.
        rows_empty: Rows in the files without a trained token; counted like rows_malformed.
        rows_partly_empty: Rows in the files with empty answers, which are not trained, and other answers.
        rows_in_files: Rows in all files of the sources, including malformed and empty rows.
        rows_duplicate: Rows in the files whose tokens and labels equal those of an earlier row.
        rows_held_out: Rows held out for evaluation by eval.share.
        fields_without_effect: Rows in the files with a field that is not used, by the name of the field.
        notes: Rows in the files by the names in `orchestrator.data.conversation.NOTES`.
    """

    rows: int = 0
    documents: int = 0
    tokens_read: int = 0
    tokens_kept: int = 0
    tokens_truncated: int = 0
    tokens_dropped: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    rows_split: int = 0
    rows_malformed: int = 0
    trained_tokens: int = 0
    rows_empty: int = 0
    rows_partly_empty: int = 0
    rows_in_files: int = 0
    rows_duplicate: int = 0
    rows_held_out: int = 0
    fields_without_effect: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        mine, theirs = asdict(self), asdict(other)
        fields, notes = (
            dict(sorted((Counter(mine.pop(key)) + Counter(theirs.pop(key))).items())) for key in _BY_NAME
        )
        sums = {key: mine[key] + theirs[key] for key in mine}
        return TokenCounts(**sums, fields_without_effect=fields, notes=notes)


@dataclass(frozen=True)
class Corpus:
    """The documents of an epoch.

    Attributes:
        stores: Token store of each source.
        loss_on: Which turns are trained.
        store: Index of the store of each document, uint16, shape [documents].
        row: Its row in the store, int64, shape [documents].
        start: Offset of its first token in the row, int64, shape [documents].
        lengths: Its number of tokens, int64, shape [documents].
        trained: Its number of trained tokens, int64, shape [documents].
        source_counts: Token counts of each source.
    """

    stores: tuple[TokenStore, ...]
    loss_on: LossOn
    store: npt.NDArray[np.uint16]
    row: Int64Array
    start: Int64Array
    lengths: Int64Array
    trained: Int64Array
    source_counts: tuple[TokenCounts, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def counts(self) -> TokenCounts:
        """Token counts over all sources."""
        return sum(self.source_counts, TokenCounts())

    def document(self, number: int) -> Document:
        """Return one document; its tokens are a view of the mapped file."""
        row = self.stores[int(self.store[number])].row(int(self.row[number]))
        part = slice(int(self.start[number]), int(self.start[number] + self.lengths[number]))
        return Document(row.tokens[part], is_trained(row.turn[part], self.loss_on))

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Return the hash of each row that has a document, once for each row, uint64, shape [rows]."""
        hashes = [
            store.hashes[np.unique(self.row[self.store == number])]
            for number, store in enumerate(self.stores)
        ]
        return np.concatenate(hashes)

    def cut(self, pieces: Pieces) -> Corpus:
        """Return a corpus whose documents are pieces of the documents of this one."""
        store, row = self.store[pieces.document], self.row[pieces.document]
        start = self.start[pieces.document] + pieces.start
        # Consecutive documents belong to the same reading of a row if their start increases; a repeated row
        # starts again. `reading` numbers these readings, shape [pieces].
        continues = (np.diff(self.store) == 0) & (np.diff(self.row) == 0) & (np.diff(self.start) > 0)
        reading = np.append(0, np.cumsum(~continues))[pieces.document]
        trained = np.zeros(len(row), np.int64)
        source_counts = []
        for number, counts in enumerate(self.source_counts):
            mine = store == number
            # Counted anew: the first token of a piece has no token before it, so it is no longer trained.
            trained[mine] = self.stores[number].trained(
                row[mine], start[mine], pieces.length[mine], self.loss_on
            )
            # Pieces of each reading; more than one: the row was split, by `document_parts` or by a cut.
            parts = np.bincount(reading[mine], minlength=1)
            source_counts.append(
                replace(
                    counts,
                    documents=int(mine.sum()),
                    trained_tokens=int(trained[mine].sum()),
                    rows_split=int((parts > 1).sum()),
                )
            )
        return Corpus(
            self.stores, self.loss_on, store, row, start, pieces.length, trained, tuple(source_counts)
        )


def build(
    stores: Sequence[TokenStore],
    sources: Sequence[SourceSpec],
    data: DataSpec,
    seed: int,
    split: Split = ALL_ROWS,
) -> Corpus:
    """Select the rows of an epoch and cut them to max_length.

    Args:
        stores: Token store of each source.
        sources: Sample size, repeat and weight of each source.
        data: Truncation, max_length, loss_on and deduplicate.
        seed: Seed of sampling.
        split: Which rows are read.

    Raises:
        SpecError: A sample is larger than its source, the rows cannot be split, or no document remains.
    """
    parts: list[dict[str, Any]] = []
    source_counts: list[TokenCounts] = []
    selections = select_rows(stores, sources, seed, split, data.deduplicate)
    for number, (store, selection) in enumerate(zip(stores, selections, strict=True)):
        part, counts = _documents(store, selection.rows, data)
        parts.append({**part, "store": np.full(len(part["row"]), number, np.uint16)})
        source_counts.append(
            replace(counts, rows_duplicate=selection.duplicate, rows_held_out=selection.held_out)
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    corpus = Corpus(tuple(stores), data.loss_on, **joined, source_counts=tuple(source_counts))
    if len(corpus) == 0:
        counts = corpus.counts
        raise SpecError(
            f"no row of {', '.join(source.path for source in sources)} keeps a token to train on: "
            f"{counts.rows_dropped} of {counts.rows} were dropped with max_length={data.max_length}, "
            f"truncation={data.truncation} and loss_on={data.loss_on}; raise data.max_length, or change these"
        )
    return corpus


def _documents(store: TokenStore, rows: Int64Array, data: DataSpec) -> tuple[dict[str, Any], TokenCounts]:
    # whole: tokens of each row that is read, [rows]. at (index into `rows`), start, length and trained: one
    # entry for each document cut from them, [documents]; a row gives none, one or, with split, several.
    whole = store.lengths[rows]
    at, start, length = document_parts(whole, data)
    trained = store.trained(rows[at], start, length, data.loss_on)
    # A document without a trained token would cost time and change nothing.
    used = trained > 0
    dropped_parts = np.bincount(at[~used], weights=length[~used], minlength=len(rows)).astype(np.int64)
    at, start, length, trained = at[used], start[used], length[used], trained[used]
    kept = np.bincount(at, weights=length, minlength=len(rows)).astype(np.int64)
    # For every row, whole = kept + dropped + truncated. A part that is dropped from a split row counts as
    # dropped; with the other truncations, a row is either dropped as a whole or loses an end.
    is_kept = kept > 0
    dropped = np.where(is_kept, dropped_parts if data.truncation == "split" else 0, whole)
    truncated = whole - kept - dropped
    left = {name: store.manifest[name] for name in _FROM_MANIFEST}
    counts = TokenCounts(
        rows_in_files=len(store) + left["rows_malformed"] + left["rows_empty"],
        rows=len(rows),
        documents=len(at),
        tokens_read=int(whole.sum()),
        tokens_kept=int(kept.sum()),
        tokens_truncated=int(truncated.sum()),
        tokens_dropped=int(dropped.sum()),
        rows_truncated=int((truncated > 0).sum()),
        rows_dropped=int((~is_kept).sum()),
        rows_split=int((np.bincount(at, minlength=1) > 1).sum()),
        **left,
        trained_tokens=int(trained.sum()),
    )
    return {"row": rows[at], "start": start, "lengths": length, "trained": trained}, counts


def document_parts(whole: Int64Array, data: DataSpec) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return the row, first token and length of each document after truncation, each [documents].

    Args:
        whole: Tokens of each row, shape [rows].
        data: Truncation and max_length.
    """
    limit = data.max_length
    at = np.flatnonzero(whole > 0)
    if data.truncation == "split":
        # counts: parts of each row, [rows]; number: 0, 1, ... within the row of each part, [documents].
        counts = -(-whole[at] // limit)
        number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(at, counts)
        start = number * limit
        return at, start, np.minimum(limit, whole[at] - start)
    if data.truncation == "drop":
        at = at[whole[at] <= limit]
    length = np.minimum(whole[at], limit)
    start = whole[at] - length if data.truncation == "left" else np.zeros(len(at), np.int64)
    return at, start, length
