"""Tokenised rows on disk: Arrow shards that every worker maps into memory.

A store holds one source, tokenised whole by one tokenizer and template. It knows nothing of max_length,
packing or which turns are trained, so that every run over the same data shares it; what is learnt of rows
without an answer (`orchestrator.data.rows.Learnt`) decides which rows it holds. It is written once and then
only read:

    shard-00000.arrow   Arrow file with the columns input_ids (uint32) and turn (uint8), a list for each row
    index.npy           for each row: offset in its shard, length, and how many of its tokens are answers
    malformed.jsonl     rows that were left out, with their place and the reason
    empty.jsonl         rows that were left out because they have nothing to learn, with their place and why
    partly_empty.jsonl  rows of which an answer is empty and not learnt, and others are
    manifest.json       counts, rows and checksum of each shard, and a checksum of all that
"""

from __future__ import annotations

import io
import json
import os
import socket
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, RESPONSE, Encoded
from orchestrator.errors import ClusterError

MANIFEST = "manifest.json"
MALFORMED = "malformed.jsonl"
EMPTY = "empty.jsonl"
PARTLY_EMPTY = "partly_empty.jsonl"
_INDEX = "index.npy"
_INDEX_ROW = np.dtype([("offset", "<i8"), ("length", "<u4"), ("response", "<u4"), ("last", "<u4")])
_OPEN_SHARDS = 256

Int64Array = npt.NDArray[np.int64]
LossOn = Literal["response", "all", "last_turn"]
Left = tuple[str, str]
"""Place of a row that was left out, whole or in part, and the reason."""
_LEAST_TURN = {"all": CONTEXT, "response": RESPONSE, "last_turn": LAST_RESPONSE}


@dataclass(frozen=True)
class Shard:
    """What the index and the manifest need of one shard.

    Attributes:
        index: One entry a row.
        checksum: CRC-32 of the file.
        largest_token: Largest token id of its rows; -1 without any.
        malformed: Rows that are none.
        empty: Rows that have nothing to learn.
        partly_empty: Rows that are kept and of which an answer has no text.
    """

    index: npt.NDArray[np.void]
    checksum: int
    largest_token: int
    malformed: tuple[Left, ...] = ()
    empty: tuple[Left, ...] = ()
    partly_empty: tuple[Left, ...] = ()


def write_shard(
    folder: Path,
    number: int,
    rows: Sequence[Encoded],
    malformed: Sequence[Left] = (),
    empty: Sequence[Left] = (),
    partly_empty: Sequence[Left] = (),
) -> Shard:
    """Write one shard and return what the index needs of it."""
    nothing = Encoded(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
    tokens = np.concatenate([row.tokens for row in (*rows, nothing)])
    turn = np.concatenate([row.turn for row in (*rows, nothing)])
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    ends = np.append(0, np.cumsum(lengths))
    columns = [pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values)) for values in (tokens, turn)]
    batch = pa.RecordBatch.from_arrays(columns, names=["input_ids", "turn"])
    path = folder / _shard_name(number)
    with pa.OSFile(str(path), "wb") as file, ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    index = np.zeros(len(rows), _INDEX_ROW)
    index["offset"], index["length"] = ends[:-1], lengths
    for field, least in (("response", RESPONSE), ("last", LAST_RESPONSE)):
        before = np.append(0, np.cumsum(turn >= least))
        # Not the first token: it has nothing before it to be predicted from.
        index[field] = before[ends[1:]] - before[np.minimum(ends[:-1] + 1, ends[1:])]
    largest = int(tokens.max()) if len(tokens) else -1
    left_out = (tuple(malformed), tuple(empty), tuple(partly_empty))
    return Shard(index, zlib.crc32(path.read_bytes()), largest, *left_out)


def write_index(folder: Path, shards: Sequence[Shard], about: dict[str, object]) -> None:
    """Write the index of all shards and, last, the manifest that makes the store complete."""
    index = np.concatenate([shard.index for shard in shards]) if shards else np.zeros(0, _INDEX_ROW)
    data = io.BytesIO()  # numpy itself does not say why it cannot write a file
    np.save(data, index)
    (folder / _INDEX).write_bytes(data.getbuffer())
    left_out = {
        MALFORMED: [entry for shard in shards for entry in shard.malformed],
        EMPTY: [entry for shard in shards for entry in shard.empty],
        PARTLY_EMPTY: [entry for shard in shards for entry in shard.partly_empty],
    }
    for name, left in left_out.items():
        lines = [json.dumps({"place": place, "reason": reason}) + "\n" for place, reason in left]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    manifest = {
        **about,
        "rows": len(index),
        "rows_malformed": len(left_out[MALFORMED]),
        "rows_empty": len(left_out[EMPTY]),
        "rows_partly_empty": len(left_out[PARTLY_EMPTY]),
        "tokens": int(index["length"].sum(dtype=np.int64)),
        "largest_token": max((shard.largest_token for shard in shards), default=-1),
        "index_checksum": zlib.crc32(data.getbuffer()),
        "shards": [[len(shard.index), shard.checksum] for shard in shards],
    }
    draft = folder / f".{MANIFEST}"
    draft.write_text(seal(manifest), encoding="utf-8")
    draft.replace(folder / MANIFEST)


def seal(values: dict[str, Any]) -> str:
    """Return values as JSON that holds a checksum of itself."""
    return json.dumps({**values, "checksum": zlib.crc32(json.dumps(values).encode())}, indent=2)


def unseal(text: str) -> dict[str, Any]:
    """Return what was sealed.

    Raises:
        ValueError, KeyError, TypeError: It is something else.
    """
    values: dict[str, Any] = json.loads(text)
    checksum = values["checksum"]
    del values["checksum"]
    if zlib.crc32(json.dumps(values).encode()) != checksum:
        raise ValueError("checksum mismatch")
    return values


def draft_of(folder: Path) -> Path:
    """Return where a folder is made before it gets its name; it says who makes it, in case that one dies."""
    return folder.with_name(
        f"{folder.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    )


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


class TokenStore:
    """A complete store, opened for reading; a shard is mapped and its checksum tested when first touched.

    Raises:
        ClusterError: From any method, where a file is missing or not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = MANIFEST
        try:
            self.manifest = unseal((folder / MANIFEST).read_text(encoding="utf-8"))
            checksum, shards = self.manifest["index_checksum"], self.manifest["shards"]
            name = _INDEX
            data = (folder / _INDEX).read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, str(error)) from None
        if zlib.crc32(data) != checksum:
            raise self._damaged(_INDEX, "checksum mismatch")
        self._index = np.load(folder / _INDEX, mmap_mode="r")
        self._checksums = [checksum for _, checksum in shards]
        self._first_rows = np.append(0, np.cumsum([rows for rows, _ in shards]))
        self._open: OrderedDict[int, tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]] = OrderedDict()
        self._tested: set[int] = set()

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def lengths(self) -> Int64Array:
        """Tokens of each row, shape [rows]."""
        lengths: Int64Array = self._index["length"].astype(np.int64)
        return lengths

    @property
    def malformed(self) -> list[Left]:
        """Rows that were left out because they are none."""
        return self._left_out(MALFORMED)

    @property
    def empty(self) -> list[Left]:
        """Rows that were left out because they have nothing to learn."""
        return self._left_out(EMPTY)

    @property
    def partly_empty(self) -> list[Left]:
        """Rows that are kept and of which an answer has no text, which is not learnt."""
        return self._left_out(PARTLY_EMPTY)

    def _left_out(self, name: str) -> list[Left]:
        try:
            lines = (self.folder / name).read_text("utf-8").splitlines()
            return [(entry["place"], entry["reason"]) for entry in map(json.loads, lines)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, str(error)) from None

    def row(self, number: int) -> Encoded:
        """Return one row; its arrays are views of the mapped file."""
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        tokens, turn = self._shard(shard)
        start = int(self._index["offset"][number])
        stop = start + int(self._index["length"][number])
        return Encoded(tokens[start:stop], turn[start:stop])

    def trained(
        self, rows: Int64Array, starts: Int64Array, lengths: Int64Array, loss_on: LossOn
    ) -> Int64Array:
        """Return how many tokens of each part of a row are trained; the first of a part never is.

        Args:
            rows: Row of each part, shape [parts].
            starts: First token of each part in its row, shape [parts].
            lengths: Tokens of each part, shape [parts].
            loss_on: Which turns are trained.

        Returns:
            Counts, shape [parts].
        """
        if loss_on == "all":
            return np.maximum(lengths - 1, 0)
        known = self._index["response" if loss_on == "response" else "last"]
        counts: Int64Array = known[rows].astype(np.int64)
        cut = np.flatnonzero(lengths < self.lengths[rows])
        shards = np.searchsorted(self._first_rows, rows[cut], side="right") - 1
        order = np.argsort(shards, kind="stable")
        cut, shards = cut[order], shards[order]
        for shard in np.unique(shards).tolist():
            these = cut[np.searchsorted(shards, shard) : np.searchsorted(shards, shard, side="right")]
            is_trained = self._shard(shard)[1] >= _LEAST_TURN[loss_on]
            before = np.append(0, np.cumsum(is_trained))
            first = self._index["offset"][rows[these]] + starts[these]
            end = first + lengths[these]
            counts[these] = before[end] - before[np.minimum(first + 1, end)]
        return counts

    def _shard(self, number: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        name = _shard_name(number)
        try:
            file = pa.memory_map(str(self.folder / name))
            if number not in self._tested:
                if zlib.crc32(file.read_buffer()) != self._checksums[number]:
                    raise self._damaged(name, "checksum mismatch")
                self._tested.add(number)
                file.seek(0)
            batch = ipc.open_file(file).get_batch(0)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(name, str(error)) from None
        columns = tuple(column.values.to_numpy(zero_copy_only=True) for column in batch.columns)
        self._open[number] = columns
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return columns

    def _damaged(self, name: str, reason: str) -> ClusterError:
        return ClusterError(
            f"{self.folder / name} is damaged or not readable ({reason}); remove the folder {self.folder}, "
            "and the data will be tokenized again"
        )


def is_trained(turn: npt.NDArray[np.uint8], loss_on: LossOn) -> npt.NDArray[np.bool_]:
    """Return which tokens of a part of a row are targets of the loss: never the first."""
    trained: npt.NDArray[np.bool_] = turn >= _LEAST_TURN[loss_on]
    trained[:1] = False
    return trained
