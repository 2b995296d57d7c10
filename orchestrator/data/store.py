"""Tokenised documents on disk: flat shards that every worker maps into memory.

A store is a folder that is written once and then only read:

    tokens-00000.npy    token ids of the shard's documents, one after another, uint32
    trained-00000.npy   whether each of them is a target of the loss, bool
    index.npz           documents in order: shard, offset, length, trained
    manifest.json       what was read, kept, truncated and dropped
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.data.template import Document

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Account:
    """What became of the rows that were read; counts of rows and of tokens."""

    rows: int = 0
    documents: int = 0
    tokens_read: int = 0
    tokens_kept: int = 0
    tokens_truncated: int = 0
    tokens_dropped: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    trained_tokens: int = 0

    def __add__(self, other: Account) -> Account:
        mine, theirs = asdict(self), asdict(other)
        return Account(**{key: mine[key] + theirs[key] for key in mine})


@dataclass(frozen=True)
class ShardIndex:
    """Lengths and trained tokens of one shard's documents, in order."""

    lengths: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]
    account: Account


def write_shard(folder: Path, number: int, documents: Sequence[Document], account: Account) -> ShardIndex:
    """Write one shard and return what the index needs of it."""
    empty = Document(np.zeros(0, np.uint32), np.zeros(0, np.bool_))
    tokens = np.concatenate([document.tokens for document in (*documents, empty)])
    trained = np.concatenate([document.trained for document in (*documents, empty)])
    np.save(folder / f"tokens-{number:05d}.npy", tokens)
    np.save(folder / f"trained-{number:05d}.npy", trained)
    return ShardIndex(
        lengths=np.array([len(document.tokens) for document in documents], dtype=np.int64),
        # Not the first token: the loader has nothing before it to predict it from.
        trained=np.array([int(document.trained[1:].sum()) for document in documents], dtype=np.int64),
        account=account,
    )


def write_index(folder: Path, shards: Sequence[ShardIndex], about: dict[str, object]) -> None:
    """Write the index of all shards and, last, the manifest that makes the store complete."""
    lengths = np.concatenate([shard.lengths for shard in shards])
    starts = [np.concatenate([[0], np.cumsum(shard.lengths)[:-1]]) for shard in shards if len(shard.lengths)]
    np.savez(
        folder / "index.npz",
        shard=np.repeat(np.arange(len(shards)), [len(shard.lengths) for shard in shards]),
        offset=np.concatenate(starts).astype(np.int64) if starts else np.zeros(0, np.int64),
        length=lengths,
        trained=np.concatenate([shard.trained for shard in shards]),
    )
    account = sum((shard.account for shard in shards), Account())
    (folder / MANIFEST).write_text(
        json.dumps({"account": asdict(account), **about}, indent=2), encoding="utf-8"
    )


class TokenStore:
    """A complete store, opened for reading; shards are mapped when first touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.account = Account(**manifest["account"])
        with np.load(folder / "index.npz") as index:
            self._shard, self._offset = index["shard"], index["offset"]
            self.lengths: npt.NDArray[np.int64] = index["length"]
            self.trained: npt.NDArray[np.int64] = index["trained"]

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> Document:
        """Return one document; its arrays are views of the mapped file."""
        tokens, trained = self._shards[int(self._shard[number])]
        start = int(self._offset[number])
        stop = start + int(self.lengths[number])
        return Document(tokens[start:stop], trained[start:stop])

    @cached_property
    def _shards(self) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
        count = int(self._shard.max()) + 1 if len(self._shard) else 0
        return [
            (
                np.load(self.folder / f"tokens-{number:05d}.npy", mmap_mode="r"),
                np.load(self.folder / f"trained-{number:05d}.npy", mmap_mode="r"),
            )
            for number in range(count)
        ]
