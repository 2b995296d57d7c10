"""Reads tensors of a checkpoint, or parts of them, and verifies the blocks that it reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from orchestrator.checkpoint.hashed_file import DamagedFileError, VerifiedReader, read_table
from orchestrator.checkpoint.manifest import DamagedCheckpointError, Manifest, TensorEntry, remedy
from orchestrator.checkpoint.tensor_parts import Parts, TensorPart, dtype_of
from orchestrator.errors import TrainingError


class _Read(NamedTuple):
    """Bytes of a file that hold some elements of a tensor."""

    start: int
    length: int
    dtype: torch.dtype
    target: Tensor


class TensorReader:
    """Reads from the files of one checkpoint, and keeps their tables of digests.

    Args:
        checkpoint: The checkpoint.
        manifest: Its manifest.

    Attributes:
        bytes_read: Bytes read so far, tables of digests included.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._checkpoint, self._manifest = checkpoint, manifest
        self._tables: dict[int, bytes] = {}
        self.bytes_read = 0

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of a tensor in the manifest."""
        return self._manifest["tensors"][name]

    def fill(self, parts: Parts) -> None:
        """Read the values of parts, whichever chunks hold them.

        Args:
            parts: Parts of tensors that the checkpoint has with the same number of elements.

        Raises:
            DamagedCheckpointError: A file is missing or damaged.
        """
        reads: dict[int, list[_Read]] = defaultdict(list)
        for name, part in parts.items():
            entry = self._manifest["tensors"][name]
            dtype = dtype_of(entry["dtype"])
            for item in create_read_items_for_chunk_list(name, _as_dcp(entry), [part.chunk]):
                assert item.storage_index.index is not None
                _, _, number, start = entry["chunks"][item.storage_index.index]
                length = item.lengths[0]
                target = part.values.narrow(0, item.dest_offsets[0], length)
                start += item.storage_offsets[0] * dtype.itemsize
                reads[number].append(_Read(start, length * dtype.itemsize, dtype, target))
        for number, of_file in sorted(reads.items()):
            with self._opened(number) as reader:
                for each in sorted(of_file, key=lambda read: read.start):
                    _fill(each, reader.read(each.start, each.length))

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor.

        Raises:
            DamagedCheckpointError: A file is missing or damaged.
        """
        entry = self._manifest["tensors"][name]
        values = torch.empty(math.prod(entry["shape"]), dtype=dtype_of(entry["dtype"]))
        self.fill({name: TensorPart(values, 0, values.numel())})
        return values.view(entry["shape"])

    def problems(self) -> list[str]:
        """Read all files, and return an error message for each that is missing or damaged."""
        found: list[str] = []
        for number, file in enumerate(self._manifest["files"]):
            try:
                with self._opened(number) as reader:
                    for _ in reader.read(0, file["table_start"]):
                        pass
            except DamagedCheckpointError as error:
                found += error.problems
        return found

    @contextmanager
    def _opened(self, number: int) -> Iterator[VerifiedReader]:
        """Open a file; errors name its path and the tensors that are hit."""
        entry = self._manifest["files"][number]
        path = self._checkpoint / entry["name"]
        try:
            with path.open("rb") as file:

                def read(start: int, length: int) -> bytes:
                    file.seek(start)
                    return file.read(length)

                if number not in self._tables:
                    self._tables[number] = read_table(read, entry["table_start"], entry["table_digest"])
                    self.bytes_read += len(self._tables[number])
                reader = VerifiedReader(read, entry["table_start"], self._tables[number])
                yield reader
                self.bytes_read += reader.bytes_read
        except DamagedFileError as error:
            names = self._tensors_at(number, error.start, error.end) if error.start is not None else []
            hit = f" ({', '.join(names)})" if names else ""
            raise DamagedCheckpointError(
                f"{path} is damaged: {error}{hit}; {remedy(self._checkpoint)}"
            ) from None
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{path}, a file of the checkpoint, is missing; {remedy(self._checkpoint)}"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(
                f"{path}, a file of the checkpoint, cannot be read ({reason}); make it readable on every node"
            ) from None

    def _tensors_at(self, number: int, start: int, end: int) -> list[str]:
        """Return the names of the tensors with bytes in a range of a file."""
        return [
            name
            for name, entry in self._manifest["tensors"].items()
            for _, length, of_file, at in entry["chunks"]
            if of_file == number and at < end and start < at + length * dtype_of(entry["dtype"]).itemsize
        ]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint that is read when its values are asked for.

    Attributes:
        reader: Reads from the checkpoint.
        name: Name of the tensor in the manifest.
    """

    reader: TensorReader
    name: str

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the checkpoint."""
        return dtype_of(self.reader.entry(self.name)["dtype"])

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self.reader.entry(self.name)["shape"])

    def contiguous(self) -> Tensor:
        """Read the tensor.

        Raises:
            DamagedCheckpointError: A file is missing or damaged.
        """
        return self.reader.tensor(self.name)


def _as_dcp(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype_of(entry["dtype"])),
        torch.Size([math.prod(entry["shape"])]),
        [
            ChunkStorageMetadata(torch.Size([first]), torch.Size([length]))
            for first, length, *_ in entry["chunks"]
        ],
    )


@torch.no_grad()
def _fill(read: _Read, pieces: Iterable[memoryview]) -> None:
    """Copy bytes to a tensor, which may be on a device or of another dtype."""
    target = read.target
    is_direct = target.device.type == "cpu" and target.dtype == read.dtype and target.is_contiguous()
    values = target if is_direct else torch.empty(target.shape, dtype=read.dtype)
    buffer = values.view(torch.uint8).numpy().data
    at = 0
    for piece in pieces:
        buffer[at : at + len(piece)] = piece
        at += len(piece)
    if not is_direct:
        target.copy_(values)
