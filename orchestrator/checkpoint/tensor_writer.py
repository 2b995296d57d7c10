"""Writes the files of a checkpoint: one of safetensors for each rank, with parts of the logical tensors.

A file is written in one pass. Its blocks are hashed on the way, and their digests are its last tensor.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from orchestrator.checkpoint.hashed_file import DIGEST_BYTES, HashingWriter, digest, table_bytes
from orchestrator.checkpoint.manifest import TensorEntry, TensorFile
from orchestrator.checkpoint.tensor_parts import dtype_name, dtype_of

_PIECE_ELEMENTS = 2**24  # of a tensor that is copied from a device at once
_TABLE = "block_digests"


class TensorFileWriter(StorageWriter):
    """Writes this rank's parts to a file in a folder; DCP's `save` calls it.

    Args:
        folder: An existing folder, the same on all ranks.
        on_written: Called on rank 0 with the tensors and files, once all ranks have written theirs.
    """

    def __init__(
        self, folder: Path, on_written: Callable[[dict[str, TensorEntry], list[TensorFile]], None]
    ) -> None:
        self._folder, self._on_written = folder, on_written

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the files: one for each rank that has something to write."""
        numbers = itertools.count()
        return [replace(plan, storage_data=next(numbers) if plan.items else None) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the file of this rank; each result has its chunk, and the first one also the file."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        number: int = plan.storage_data
        name = f"tensors-{number:05d}.safetensors"
        header, starts = _header(plan.items)
        with (self._folder / name).open("wb") as file:
            written = HashingWriter(file)
            written.write(memoryview(header))
            for item in plan.items:
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor)
                for piece in _pieces(values):
                    written.write(piece)
            table = written.table()
            file.write(table)
            file.flush()
            os.fsync(file.fileno())
        entry: TensorFile = {
            "name": name,
            "bytes": written.length + len(table),
            "table_start": written.length,
            "table_digest": digest(table).hex(),
        }
        return [
            WriteResult(item.index, _size(item), (number, start, None if at else entry))
            for at, (item, start) in enumerate(zip(plan.items, starts, strict=True))
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Join what the ranks have written, on rank 0."""
        tensors: dict[str, TensorEntry] = {}
        files: list[TensorFile] = []
        for name, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            tensors[name] = {
                "dtype": dtype_name(saved.properties.dtype),
                "shape": list(saved.size),
                "chunks": [],
            }
        for result in itertools.chain.from_iterable(results):
            number, start, entry = result.storage_data
            tensor = tensors[result.index.fqn]
            assert result.index.offset is not None
            (first,) = result.index.offset
            length = result.size_in_bytes // dtype_of(tensor["dtype"]).itemsize
            tensor["chunks"].append((first, length, number, start))
            files += [entry] if entry is not None else []
        for tensor in tensors.values():
            tensor["chunks"].sort()
        self._on_written(tensors, sorted(files, key=lambda file: file["name"]))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Refuse: DCP chooses no writer here."""
        return False


def _size(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _header(items: Iterable[WriteItem]) -> tuple[bytes, list[int]]:
    """Return the header of a file of safetensors, and the first byte of each item in the file."""
    entries: dict[str, dict[str, object]] = {}
    offsets: list[int] = []
    length = 0
    for item in items:
        assert item.tensor_data is not None
        (first,), (count,) = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
        name = item.index.fqn
        if count != item.tensor_data.size.numel():
            name = f"{name}[{first}:{first + count}]"
        end = length + _size(item)
        dtype = dtype_name(item.tensor_data.properties.dtype)
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [length, end]}
        offsets.append(length)
        length = end
    header = b""
    while True:  # the length of the header depends on that of the table, and the other way round
        blocks = table_bytes(len(header) + length) // DIGEST_BYTES
        table = {
            "dtype": "U8",
            "shape": [blocks, DIGEST_BYTES],
            "data_offsets": [length, length + blocks * DIGEST_BYTES],
        }
        text = json.dumps({**entries, _TABLE: table}, separators=(",", ":")).encode()
        padded = text.ljust(-(-len(text) // 64) * 64)
        following = len(padded).to_bytes(8, "little") + padded
        if len(following) == len(header):
            return following, [len(header) + offset for offset in offsets]
        header = following


def _pieces(values: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a 1-D tensor."""
    values = values.detach()
    for start in range(0, values.numel(), _PIECE_ELEMENTS):
        piece = values[start : start + _PIECE_ELEMENTS]
        yield piece.cpu().contiguous().view(torch.uint8).numpy().data
