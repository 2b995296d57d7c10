"""Where rows come from: files of JSON, JSON lines, Parquet and Arrow, here or behind a URI, read in blocks.

A source names a file, a folder of files, a data set that was saved to disk, a URI (s3://, gs://, hdfs://) or
a data set of the Hugging Face hub. All of them become a list of files. Reading holds one block of rows at a
time, whatever the size of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs, ipc, parquet

from orchestrator.config.paths import resolve
from orchestrator.config.schema import SourceSpec
from orchestrator.data import json_stream
from orchestrator.data.sources import (
    Kind,
    absent,
    has_rows,
    kind_of,
    local_files,
    looks_like_hub_name,
    of_split,
    unreadable,
)
from orchestrator.errors import SpecError

_ROWS_PER_BLOCK = 4096
_BYTES_PER_BLOCK = 4 * 2**20
_fingerprints: dict[tuple[str, str, int, int], str] = {}  # of files as they were at a size and a time


@dataclass(frozen=True)
class Block:
    """Rows that stand together in a file.

    Attributes:
        file: The file, as the job names it.
        unit: What a place in it is called.
        numbers: Place of each row, from 1.
        values: Each row: JSON text that is yet to be parsed, or what the file held there.
    """

    file: str
    unit: Literal["row", "line"]
    numbers: tuple[int, ...]
    values: tuple[Any, ...]

    def source_line(self, index: int) -> str:
        """Return the file and line (or row number) of a row, for messages."""
        return f"data file {self.file}, {self.unit} {self.numbers[index]}"


@dataclass(frozen=True)
class DataFile:
    """One file with rows.

    Attributes:
        name: As messages call it.
        path: In its file system.
        kind: How rows are written.
        compression: Codec of a compressed text file.
        uri: Where it lies, if not on a file system that is mounted here.
    """

    name: str
    path: str
    kind: Kind
    compression: str | None = None
    uri: str | None = None

    def fingerprint(self) -> str:
        """Return a hash of the file's bytes, with its size and time of change as they were meanwhile."""
        try:
            before, digest = self._stamp(), hashlib.sha256()
            with self._system().open_input_stream(self.path, compression=None) as stream:
                while chunk := stream.read(2**22):
                    digest.update(chunk)
            if self._stamp() != before:
                raise changed(self.name)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.name, error) from None
        _fingerprints[(self.uri or "", self.path, *before)] = digest.hexdigest()
        return digest.hexdigest()

    def known_fingerprint(self) -> str:
        """Return the hash that this process has computed of the file as it is now, or compute it."""
        return _fingerprints.get((self.uri or "", self.path, *self.stamp())) or self.fingerprint()

    def stamp(self) -> tuple[int, int]:
        """Return size and time of change."""
        try:
            return self._stamp()
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.name, error) from None

    def blocks(self) -> Iterator[Block]:
        """Yield the rows in order, in blocks of some thousand rows or some MiB.

        Raises:
            SpecError: The file cannot be read, or is not what its name says.
        """
        try:
            if self.kind == "json":
                yield from self._json_blocks()
            else:
                yield from self._table_blocks()
        except json_stream.JsonTextError as error:
            raise SpecError(f"data file {self.name} {error}") from None
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # also of single values
            raise unreadable(self.name, error) from None

    def _json_blocks(self) -> Iterator[Block]:
        with self._system().open_input_stream(self.path, compression=self.compression) as stream:
            found = json_stream.rows(lambda: stream.read(2**20))
            unit, entries = found
            numbers: list[int] = []
            values: list[Any] = []
            size = 0
            for number, value, length in entries:
                numbers.append(number)
                values.append(value)
                size += length
                if len(values) >= _ROWS_PER_BLOCK or size >= _BYTES_PER_BLOCK:
                    yield Block(self.name, unit, tuple(numbers), tuple(values))
                    numbers, values, size = [], [], 0
            if values:
                yield Block(self.name, unit, tuple(numbers), tuple(values))

    def _table_blocks(self) -> Iterator[Block]:
        first = 1
        with self._system().open_input_file(self.path) as file:
            for batch in _batches(file, self.kind):
                rows = max(1, min(_ROWS_PER_BLOCK, batch.num_rows * _BYTES_PER_BLOCK // max(1, batch.nbytes)))
                for start in range(0, batch.num_rows, rows):
                    values = tuple(batch.slice(start, rows).to_pylist())
                    yield Block(self.name, "row", tuple(range(first, first + len(values))), values)
                    first += len(values)

    def _system(self) -> Any:
        return fs.FileSystem.from_uri(self.uri)[0] if self.uri else fs.LocalFileSystem()

    def _stamp(self) -> tuple[int, int]:
        (info,) = self._system().get_file_info([self.path])
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "No such file")
        return int(info.size), int(info.mtime_ns or 0)


def _batches(file: Any, kind: Kind) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        yield from parquet.ParquetFile(file).iter_batches(batch_size=_ROWS_PER_BLOCK)
        return
    try:
        reader = ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from ipc.open_stream(file)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def locate(source: SourceSpec) -> list[DataFile]:
    """Return the files of a source, in the order in which they are read.

    Raises:
        SpecError: Nothing is there, or what is there cannot be told.
    """
    path = source.path
    if "://" in path:
        return _at_uri(source)
    here = resolve(path)
    try:
        exists = here.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    if exists:
        return [_file(name, file) for name, file in local_files(source, here)]
    if looks_like_hub_name(path):
        return _on_the_hub(source)
    raise SpecError(absent(path))


def changed(name: str) -> SpecError:
    """Return the error for a file that did not stay what it was."""
    return SpecError(
        f"data file {name} changed while it was read, so what was read of it is in doubt and nothing was "
        "kept; let whatever writes it finish, then start again"
    )


def _file(name: str, path: str, uri: str | None = None) -> DataFile:
    kind, compression = kind_of(name, path)
    return DataFile(name, path, kind, compression, uri)


def _at_uri(source: SourceSpec) -> list[DataFile]:
    try:
        system, path = fs.FileSystem.from_uri(source.path)
        (info,) = system.get_file_info([path])
        if info.type == fs.FileType.File:
            return [_file(source.path, path, source.path)]
        if info.type == fs.FileType.NotFound:
            raise SpecError(f"data file {source.path} is not there; check the URI and its credentials")
        entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(source.path, error) from None
    folder = path.rstrip("/") + "/"
    found = sorted(
        entry.path.removeprefix(folder)
        for entry in entries
        if entry.type == fs.FileType.File and has_rows(entry.path.removeprefix(folder))
    )
    return [_file(f"{source.path}: {name}", folder + name, source.path) for name in of_split(source, found)]


def _on_the_hub(source: SourceSpec) -> list[DataFile]:
    """Return the Arrow files that `datasets` makes of a data set of the hub, in its cache."""
    import datasets

    split = source.split or "train"
    try:
        found = datasets.load_dataset(source.path, source.subset, split=split, revision=source.revision)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"data set {source.path} (subset {source.subset or 'default'}, split {split}) cannot be loaded "
            f"from the hub, and no such file is here ({reason}); check the name, split and network"
        ) from None
    files = [entry["filename"] for entry in found.cache_files]
    if not files:
        raise SpecError(
            f"data set {source.path} was loaded into memory and not into the cache of `datasets`, so it has "
            "no files; unset HF_DATASETS_IN_MEMORY_MAX_SIZE, or save it to a folder and name that"
        )
    return [_file(f"{source.path}/{Path(name).name}", name) for name in files]
