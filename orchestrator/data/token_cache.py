"""On-disk cache of tokenized rows: Arrow shards that every worker memory-maps.

A store holds one source, tokenized with one tokenizer and template, without truncation. It does not depend on
max_length, packing or which answers are trained, so all runs over the same data share it. Which rows without
answers are kept depends on `orchestrator.data.rows.Learnt`. A store is written once and then read-only:

    shard-00000.arrow   Arrow file with the list columns input_ids (uint32) and turn (uint8), one list per row
    index.npy           per row: offset in its shard, length, number of answer tokens, and a hash
    malformed.jsonl     skipped malformed rows, with file, line and reason
    empty.jsonl         skipped rows without trained tokens, with file, line and reason
    partly_empty.jsonl  rows that are kept although one of their answers is empty and not trained
    manifest.json       counts, rows and CRC-32 of each shard, and a CRC-32 of the manifest itself
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import uuid
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
# One entry of index.npy, shape [rows]: position of the first token in its shard, number of tokens, number of
# trained tokens with loss_on: response and with loss_on: last_turn, and the hash of tokens and turn. Among a
# hundred million rows, the chance that any two different ones have equal hashes of 64 bits is 1 in 3700.
_INDEX_ROW = np.dtype(
    [("offset", "<i8"), ("length", "<u4"), ("response", "<u4"), ("last", "<u4"), ("hash", "<u8")]
)
_OPEN_SHARDS = 256

Int64Array = npt.NDArray[np.int64]
LossOn = Literal["response", "all", "last_turn"]
Left = tuple[str, str]
"""File and line of a row that was skipped or is partly empty, and the reason."""
_LEAST_TURN = {"all": CONTEXT, "response": RESPONSE, "last_turn": LAST_RESPONSE}


@dataclass(frozen=True)
class Shard:
    """Metadata of one shard for the index and the manifest.

    Attributes:
        index: Structured array with one entry per row, shape [rows].
        checksum: CRC-32 of the file.
        largest_token: Largest token id of the rows; -1 for an empty shard.
        malformed: Skipped malformed rows.
        empty: Skipped rows without trained tokens.
        partly_empty: Rows that are kept although one of their answers is empty.
        fields_without_effect: Number of rows with a field that is not used, by the name of the field.
        notes: Number of rows by their notes.
    """

    index: npt.NDArray[np.void]
    checksum: int
    largest_token: int
    malformed: tuple[Left, ...] = ()
    empty: tuple[Left, ...] = ()
    partly_empty: tuple[Left, ...] = ()
    fields_without_effect: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)


def write_shard(
    folder: Path,
    number: int,
    rows: Sequence[Encoded],
    malformed: Sequence[Left] = (),
    empty: Sequence[Left] = (),
    partly_empty: Sequence[Left] = (),
    fields_without_effect: Mapping[str, int] = {},
) -> Shard:
    """Write one shard.

    Args:
        folder: Folder of the store.
        number: Index of the shard, from 0.
        rows: The tokenized rows.
        malformed: Rows to list in malformed.jsonl.
        empty: Rows to list in empty.jsonl.
        partly_empty: Rows to list in partly_empty.jsonl.
        fields_without_effect: Number of rows with a field that is not used, by the name of the field.

    Returns:
        The shard's metadata for `write_index`.
    """
    nothing = Encoded(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
    tokens = np.concatenate([row.tokens for row in (*rows, nothing)])
    turn = np.concatenate([row.turn for row in (*rows, nothing)])
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    ends = np.append(0, np.cumsum(lengths))  # shape [rows + 1]: row i is tokens[ends[i]:ends[i + 1]]
    columns = [pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values)) for values in (tokens, turn)]
    batch = pa.RecordBatch.from_arrays(columns, names=["input_ids", "turn"])
    path = folder / _shard_name(number)
    with pa.OSFile(str(path), "wb") as file, ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    index = np.zeros(len(rows), _INDEX_ROW)
    index["offset"], index["length"] = ends[:-1], lengths
    for name, least in (("response", RESPONSE), ("last", LAST_RESPONSE)):
        # before[i] is the number of trained tokens among the first i of the shard, so a difference of two
        # entries counts a range. The first token of a row is excluded: no earlier token predicts it.
        before = np.append(0, np.cumsum(turn >= least))
        index[name] = before[ends[1:]] - before[np.minimum(ends[:-1] + 1, ends[1:])]
    index["hash"] = [row_hash(row) for row in rows]
    largest = int(tokens.max()) if len(tokens) else -1
    left_out = (tuple(malformed), tuple(empty), tuple(partly_empty))
    notes = Counter(note for row in rows for note in row.notes)
    return Shard(
        index, zlib.crc32(path.read_bytes()), largest, *left_out, dict(fields_without_effect), dict(notes)
    )


def row_hash(row: Encoded) -> int:
    """Return a 64-bit hash of the tokens and labels of a row; equal rows have equal hashes."""
    tokens, turn = row.tokens.astype("<u4", copy=False), row.turn.astype("u1", copy=False)
    digest = hashlib.blake2b(tokens.tobytes() + turn.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def write_index(folder: Path, shards: Sequence[Shard], about: dict[str, object]) -> None:
    """Write the index and the lists of rows, then the manifest.

    A store is complete once its manifest exists, so the manifest is written last and published by rename.

    Args:
        folder: Folder of the store.
        shards: Metadata of all shards, in order.
        about: Additional entries for the manifest.
    """
    index = np.concatenate([shard.index for shard in shards]) if shards else np.zeros(0, _INDEX_ROW)
    data = io.BytesIO()  # np.save to a file hides the reason of a failed write; write_bytes reports it
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
        "fields_without_effect": _sorted_sum([shard.fields_without_effect for shard in shards]),
        "notes": _sorted_sum([shard.notes for shard in shards]),
        "tokens": int(index["length"].sum(dtype=np.int64)),
        "largest_token": max((shard.largest_token for shard in shards), default=-1),
        "index_checksum": zlib.crc32(data.getbuffer()),
        "shards": [[len(shard.index), shard.checksum] for shard in shards],
    }
    draft = folder / f".{MANIFEST}"
    draft.write_text(seal(manifest), encoding="utf-8")
    draft.replace(folder / MANIFEST)


def _sorted_sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


def seal(values: Mapping[str, object]) -> str:
    """Serialize values as JSON with a `checksum` entry, the CRC-32 of the other entries."""
    return json.dumps({**values, "checksum": zlib.crc32(json.dumps(values).encode())}, indent=2)


def unseal(text: str) -> dict[str, Any]:
    """Parse the output of `seal` and verify its checksum.

    Raises:
        ValueError: The text is not JSON, or the checksum does not match.
        KeyError: The checksum is missing.
        TypeError: The JSON value is not an object.
    """
    values: dict[str, Any] = json.loads(text)
    checksum = values["checksum"]
    del values["checksum"]
    if zlib.crc32(json.dumps(values).encode()) != checksum:
        raise ValueError("checksum mismatch")
    return values


def draft_of(folder: Path) -> Path:
    """Return a unique draft path for a folder that will be published by rename.

    The name contains the host name and process id of the writer, so that drafts of a killed process can be
    recognized.
    """
    return folder.with_name(
        f"{folder.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    )


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


class TokenStore:
    """A complete store, opened for reading.

    A shard is memory-mapped when one of its rows is first read, and its checksum is verified then. At most
    256 shards stay mapped.

    Raises:
        ClusterError: From any method: a file is missing, not readable or corrupt.
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
        # shape [shards + 1]: shard s holds the rows _first_rows[s] to _first_rows[s + 1] - 1
        self._first_rows = np.append(0, np.cumsum([rows for rows, _ in shards]))
        self._open: OrderedDict[int, tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]] = OrderedDict()
        self._tested: set[int] = set()

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def lengths(self) -> Int64Array:
        """Number of tokens of each row, shape [rows]."""
        lengths: Int64Array = self._index["length"].astype(np.int64)
        return lengths

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of the tokens and labels of each row, uint64, shape [rows]; equal rows have equal hashes."""
        hashes: npt.NDArray[np.uint64] = self._index["hash"].astype(np.uint64)
        return hashes

    @property
    def malformed(self) -> list[Left]:
        """Malformed rows, which were skipped."""
        return self._left_out(MALFORMED)

    @property
    def empty(self) -> list[Left]:
        """Rows without trained tokens, which were skipped."""
        return self._left_out(EMPTY)

    @property
    def partly_empty(self) -> list[Left]:
        """Rows that are kept although one of their answers is empty; the empty answer is not trained."""
        return self._left_out(PARTLY_EMPTY)

    def _left_out(self, name: str) -> list[Left]:
        try:
            lines = (self.folder / name).read_text("utf-8").splitlines()
            return [(entry["place"], entry["reason"]) for entry in map(json.loads, lines)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, str(error)) from None

    def row(self, number: int) -> Encoded:
        """Return one row; its arrays are read-only views of the memory-mapped shard."""
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        tokens, turn = self._shard(shard)
        start = int(self._index["offset"][number])
        stop = start + int(self._index["length"][number])
        return Encoded(tokens[start:stop], turn[start:stop])

    def trained(
        self, rows: Int64Array, starts: Int64Array, lengths: Int64Array, loss_on: LossOn
    ) -> Int64Array:
        """Count the trained tokens of parts of rows; the first token of a part is never trained.

        Args:
            rows: Row number of each part, shape [parts].
            starts: Offset of each part in its row, in tokens, shape [parts].
            lengths: Number of tokens of each part, shape [parts].
            loss_on: Which tokens are trained.

        Returns:
            Trained tokens of each part, int64, shape [parts].
        """
        if loss_on == "all":
            return np.maximum(lengths - 1, 0)
        known = self._index["response" if loss_on == "response" else "last"]
        counts: Int64Array = known[rows].astype(np.int64)
        # The index has the counts of complete rows. Only truncated rows need their tokens: sort those parts
        # by shard, so that each shard is mapped and scanned once.
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
    """Return which tokens of a document are targets of the loss; the first token never is.

    Args:
        turn: Labels of the document's tokens, uint8, shape [length].
        loss_on: Which tokens are trained.

    Returns:
        Boolean mask, shape [length].
    """
    trained: npt.NDArray[np.bool_] = turn >= _LEAST_TURN[loss_on]
    trained[:1] = False
    return trained
