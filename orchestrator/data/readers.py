"""Lists the files of a source and reads their rows in blocks.

A source is a file, a folder of files, a dataset saved with `Dataset.save_to_disk`, a URI (s3://, gs://,
hdfs://) or a dataset of the Hugging Face hub. Each is resolved to a list of files. Reading keeps one block of
rows in memory, whatever the size of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyarrow import fs, ipc, parquet

from orchestrator.config.field_types import LARGEST
from orchestrator.config.paths import resolve
from orchestrator.config.schema import SourceSpec
from orchestrator.data import delimited, json_layout, json_stream, table_values, turns
from orchestrator.data.columns import RowNames
from orchestrator.data.file_content import ContentError, open_text, require_table, start_of
from orchestrator.data.file_patterns import base_of, has_wildcards, matches
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
from orchestrator.data.split_slice import SplitSlice, no_rows, split_of
from orchestrator.data.workbook import workbook_rows
from orchestrator.errors import SpecError

_ROWS_PER_BLOCK = 4096
_BYTES_PER_BLOCK = 4 * 2**20
# SHA-256 of each file hashed by this process, by (URI, path, size in bytes, modification time in ns).
_fingerprints: dict[tuple[str, str, int, int], str] = {}
# Number of rows of each file counted by this process, by the same key.
_counts: dict[tuple[str, str, int, int, str | None], int] = {}


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
        file: Name of the file in messages.
        unit: Whether `numbers` count rows or lines; blank lines count, but hold no row.
        numbers: Row or line number of each row, from 1.
        values: The rows: bytes of JSON that is not parsed yet, or parsed values.
        names: Names that the source has for fields and roles.
    """

    file: str
    unit: Literal["row", "line"]
    numbers: tuple[int, ...]
    values: tuple[object, ...]
    names: RowNames = dataclasses.field(default_factory=RowNames)

    def source_line(self, index: int) -> str:
        """Return the file and line (or row number) of a row, for messages."""
        return f"data file {self.file}, {self.unit} {self.numbers[index]}"


@dataclass(frozen=True)
class DataFile:
    """One data file.

    Attributes:
        name: Name of the file in messages.
        path: Path within its file system.
        kind: File format.
        compression: Compression codec by the name of a text file; None to detect it from the content.
        uri: URI of the source, which selects the file system; None for the local file system.
        names: Names that the source has for fields and roles, for the blocks.
        field: `SourceSpec.field`: the list of a JSON object, or the sheet of a workbook, with the rows.
        rows: First row to read, from 0, and the row after the last; None for all rows.
    """

    name: str
    path: str
    kind: Kind
    compression: str | None = None
    uri: str | None = None
    names: RowNames = dataclasses.field(default_factory=RowNames)
    field: str | None = None
    rows: tuple[int, int] | None = None

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file's bytes, in hexadecimal, and remember it for `known_fingerprint`.

        Raises:
            SpecError: The file cannot be read, or its size or modification time changed during the read.
        """
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
        """Return the fingerprint, hashing the file only if it changed since this process hashed it.

        Raises:
            SpecError: The file cannot be read, or changed during the read.
        """
        return _fingerprints.get((self.uri or "", self.path, *self.stamp())) or self.fingerprint()

    def stamp(self) -> tuple[int, int]:
        """Return the size in bytes and the modification time in nanoseconds.

        Raises:
            SpecError: The file is missing or not accessible.
        """
        try:
            return self._stamp()
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.name, error) from None

    def count(self) -> int:
        """Return the number of rows in the file, reading it only if it changed since this process read it.

        Raises:
            SpecError: As `blocks`.
        """
        key = (self.uri or "", self.path, *self.stamp(), self.field)
        if key not in _counts:
            _counts[key] = sum(len(block.values) for block in replace(self, rows=None).blocks())
        return _counts[key]

    def blocks(self) -> Iterator[Block]:
        """Yield the rows in order, in blocks of about 4096 rows or 4 MiB, whichever is smaller.

        Raises:
            SpecError: The file cannot be read, or its content does not match its file name extension.
        """
        try:
            blocks = self._table_blocks() if self.kind in ("parquet", "arrow") else self._entry_blocks()
            yield from self._checked(blocks if self.rows is None else _between(blocks, *self.rows))
        except (json_stream.JsonTextError, ContentError) as error:
            raise SpecError(f"data file {self.name} {error}") from None
        # ValueError and OverflowError come from `table_values`, for values that Python cannot represent.
        except (OSError, ValueError, OverflowError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            raise unreadable(self.name, error) from None

    def _checked(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yield the blocks, after a check that a table has the columns that the source names.

        Raises:
            SpecError: It does not have one of them.
        """
        first = next(blocks, None)
        if first is None:
            return
        row = next((value for value in first.values if isinstance(value, Mapping)), {})
        names = self.names.columns if self.kind not in ("json", "text") and row else {}
        missing = [name for name, key in names.items() if name not in row and key not in turns.FIELDS]
        if missing:
            raise SpecError(
                f"data file {self.name} has no column {missing[0]}, which columns names (found: "
                f"{', '.join(map(str, row))}); correct data.train[].columns"
            )
        yield first
        yield from blocks

    def _entry_blocks(self) -> Iterator[Block]:
        with ExitStack() as opened:
            unit, entries = self._entries(opened)
            numbers: list[int] = []
            values: list[object] = []
            size = 0
            for number, value, length in entries:
                numbers.append(number)
                values.append(value)
                size += length
                if len(values) >= _ROWS_PER_BLOCK or size >= _BYTES_PER_BLOCK:
                    yield Block(self.name, unit, tuple(numbers), tuple(values), self.names)
                    numbers, values, size = [], [], 0
            if values:
                yield Block(self.name, unit, tuple(numbers), tuple(values), self.names)

    def _entries(self, opened: ExitStack) -> tuple[Literal["row", "line"], json_stream.Entries]:
        """Return the unit of the numbers of rows, and the rows with their numbers and sizes."""
        if self.kind == "xlsx":
            file = opened.enter_context(self._system().open_input_file(self.path))
            if not (head := start_of(self._system(), self.path)).startswith(b"PK"):
                require_table(head)
            return "row", workbook_rows(file, self.field)

        def start() -> Callable[[], bytes]:
            stream, read = open_text(self._system(), self.path, self.compression)
            opened.callback(stream.close)
            return read

        is_json = self.kind == "json" or (self.kind == "text" and json_layout.is_json_lines(start()))
        if is_json:
            return json_layout.rows(start, self.field, self.names.columns)
        if self.field is not None:
            raise ContentError(f"is a {self.kind} file, which has no list {self.field}; remove field")
        if self.kind == "text":
            return "line", delimited.text_rows(start())
        return "line", delimited.csv_rows(start(), "\t" if self.kind == "tsv" else ",")

    def _table_blocks(self) -> Iterator[Block]:
        if self.field is not None:
            raise ContentError(f"is a {self.kind} file, which has no list {self.field}; remove field")
        require_table(start_of(self._system(), self.path))
        first = 1
        with self._system().open_input_file(self.path) as file:
            for batch in _batches(file, self.kind):
                # At the batch's mean row size, this many rows take at most _BYTES_PER_BLOCK.
                rows = max(1, min(_ROWS_PER_BLOCK, batch.num_rows * _BYTES_PER_BLOCK // max(1, batch.nbytes)))
                for start in range(0, batch.num_rows, rows):
                    values = table_values.rows(batch.slice(start, rows))
                    numbers = tuple(range(first, first + len(values)))
                    yield Block(self.name, "row", numbers, values, self.names)
                    first += len(values)

    def _system(self) -> fs.FileSystem:
        return fs.FileSystem.from_uri(self.uri)[0] if self.uri else fs.LocalFileSystem()

    def _stamp(self) -> tuple[int, int]:
        (info,) = self._system().get_file_info([self.path])
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "No such file")
        return int(info.size), int(info.mtime_ns or 0)


def _between(blocks: Iterator[Block], first: int, stop: int) -> Iterator[Block]:
    """Yield the rows from `first`, counted from 0 over all blocks, up to the one before `stop`."""
    before = 0
    for block in blocks:
        part = slice(max(0, first - before), stop - before)
        if values := block.values[part]:
            yield replace(block, values=values, numbers=block.numbers[part])
        before += len(block.values)
        if before >= stop:
            return


def _batches(file: pa.NativeFile, kind: Kind) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        yield from parquet.ParquetFile(file).iter_batches(batch_size=_ROWS_PER_BLOCK)
        return
    # The extension .arrow covers both IPC formats: files with a footer, and streams, which `datasets` writes.
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
        SpecError: The source does not exist, cannot be read, or has several splits and none was selected.
    """
    names = RowNames(source.columns, source.roles)
    files = [replace(file, names=names, field=source.field) for file in _files(source)]
    _, part = split_of(source.split)
    return files if part is None else _of_slice(files, part, source)


def _of_slice(files: list[DataFile], part: SplitSlice, source: SourceSpec) -> list[DataFile]:
    """Return the files of a slice of a split, each with its range of rows."""
    if len(files) == 1 and not part.needs_count:
        first, stop = part.rows(LARGEST)
        if first < stop:
            return [replace(files[0], rows=(first, stop))]
    counts = [file.count() for file in files]
    first, stop = part.rows(sum(counts))
    chosen: list[DataFile] = []
    before = 0
    for file, count in zip(files, counts, strict=True):
        rows = (max(0, first - before), min(count, stop - before))
        if rows[0] < rows[1]:
            chosen.append(replace(file, rows=rows))
        before += count
    if not chosen:
        raise no_rows(source.path, str(source.split), sum(counts))
    return chosen


def _files(source: SourceSpec) -> list[DataFile]:
    path = source.path
    if "://" in path:
        return _at_uri(source)
    here = resolve(path)
    try:
        exists = here.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    if exists or has_wildcards(path):
        return [_file(name, file) for name, file in local_files(source, here)]
    if looks_like_hub_name(path):
        return _on_the_hub(source)
    raise SpecError(absent(path))


def changed(name: str) -> SpecError:
    """Return the error for a file that was modified while it was read."""
    return SpecError(
        f"data file {name} changed while it was read, so what was read of it is in doubt and nothing was "
        "kept; let whatever writes it finish, then start again"
    )


def _file(name: str, path: str, uri: str | None = None) -> DataFile:
    kind, compression = kind_of(name, path)
    return DataFile(name, path, kind, compression, uri)


def _at_uri(source: SourceSpec) -> list[DataFile]:
    uri = base_of(source.path)  # the folder of a pattern
    pattern = source.path.removeprefix(uri) or "**"
    try:
        system, path = fs.FileSystem.from_uri(uri)
        (info,) = system.get_file_info([path])
        if info.type == fs.FileType.File:
            return [_file(source.path, path, source.path)]
        if info.type == fs.FileType.NotFound:
            raise SpecError(f"data file {source.path} is not there; check the URI and its credentials")
        entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(source.path, error) from None
    folder = path.rstrip("/") + "/"
    # Relative paths, so that names of parent folders do not count as hidden or as names of splits.
    names = (entry.path.removeprefix(folder) for entry in entries if entry.type == fs.FileType.File)
    found = sorted(name for name in names if has_rows(name) and matches(name, pattern))
    return [_file(f"{uri}: {name}", folder + name, uri) for name in of_split(source, found)]


def _on_the_hub(source: SourceSpec) -> list[DataFile]:
    """Download a dataset of the hub and return its Arrow files in the cache of `datasets`.

    Raises:
        SpecError: The dataset cannot be loaded, or is not backed by files.
    """
    import datasets

    split = split_of(source.split)[0] or "train"
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
