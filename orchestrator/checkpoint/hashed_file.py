"""Files with a digest of every block, so that a part of a file is verified without reading the rest.

    bytes of the file, in blocks of 16 KiB, and a table with 16 bytes (of SHA-256) for each block

The table is the last tensor of a file of `tensor_writer`, and the manifest of the checkpoint has its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

BLOCK_BYTES = 16 * 1024
DIGEST_BYTES = 16
_READ_AT_ONCE = 512 * BLOCK_BYTES


class RangeReader(Protocol):
    """Reads parts of one file."""

    def __call__(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`; fewer at the end of the file."""


class DamagedFileError(Exception):
    """A file of a checkpoint does not have the content that was written.

    Args:
        start: First byte of the damaged range; None if it is the table of digests.
        end: End of the range.
    """

    def __init__(self, start: int | None = None, end: int = 0) -> None:
        self.start, self.end = start, end
        where = "the table of digests is" if start is None else f"bytes {start:,} to {end:,} are"
        super().__init__(f"{where} not what was written")


def digest(data: bytes | memoryview) -> bytes:
    """Return the digest of a block."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


class HashingWriter:
    """Writes to a file and computes the digest of each block on the way.

    Args:
        file: Opened for writing; nothing was written to it yet.

    Attributes:
        length: Bytes written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digests = bytearray()
        self._begun = bytearray()  # of the last block, which is not full
        self.length = 0

    def write(self, data: memoryview) -> None:
        """Write bytes.

        Args:
            data: Contiguous, of format B.

        Raises:
            OSError: They cannot be written.
        """
        self._file.write(data)
        self.length += len(data)
        if self._begun:
            missing = BLOCK_BYTES - len(self._begun)
            self._begun += data[:missing]
            data = data[missing:]
            if len(self._begun) < BLOCK_BYTES:
                return
            self._digests += digest(bytes(self._begun))
            self._begun.clear()
        whole = len(data) - len(data) % BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            self._digests += digest(data[start : start + BLOCK_BYTES])
        self._begun += data[whole:]

    def table(self) -> bytes:
        """Return the digests of all blocks so far, the last of which may be shorter."""
        return bytes(self._digests) + (digest(bytes(self._begun)) if self._begun else b"")


def table_bytes(length: int) -> int:
    """Return the size of the table of a file with this many bytes before it."""
    return -(-length // BLOCK_BYTES) * DIGEST_BYTES


def read_table(read: RangeReader, length: int, table_digest: str) -> bytes:
    """Return the table of a file.

    Args:
        read: Reads from the file.
        length: Bytes before the table.
        table_digest: Digest of the table, in hexadecimal, from the manifest.

    Raises:
        DamagedFileError: The table is damaged.
        OSError: The file cannot be read.
    """
    table = read(length, table_bytes(length))
    if digest(table).hex() != table_digest:
        raise DamagedFileError
    return table


class VerifiedReader:
    """Reads parts of a file, and compares each block that they touch with its digest.

    Args:
        read: Reads from the file.
        length: Bytes before the table.
        table: The table, of `read_table`.

    Attributes:
        bytes_read: Bytes read so far.
    """

    def __init__(self, read: RangeReader, length: int, table: bytes) -> None:
        self._read, self._length, self._table = read, length, table
        self.bytes_read = 0
        self._kept: tuple[int, bytes] = (-1, b"")  # the last block that was read, by number

    def read(self, start: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes of a range in pieces of at most 8 MiB.

        Raises:
            DamagedFileError: A block of the range differs from its digest.
            OSError: The file cannot be read.
        """
        at, end = start, start + length
        while at < end:
            first = at // BLOCK_BYTES
            stop = min(end, first * BLOCK_BYTES + _READ_AT_ONCE)
            last = (stop - 1) // BLOCK_BYTES
            content = memoryview(self._blocks(first, last))
            offset = at - first * BLOCK_BYTES
            yield content[offset : offset + stop - at]
            at = stop

    def _blocks(self, first: int, last: int) -> bytes:
        """Return the verified content of consecutive blocks."""
        number, kept = self._kept
        begun = kept if number == first else b""
        if begun and last == first:
            return begun
        start = first * BLOCK_BYTES + len(begun)
        length = min((last + 1) * BLOCK_BYTES, self._length) - start
        content = self._read(start, length)
        self.bytes_read += len(content)
        if len(content) != length:
            raise DamagedFileError(start + len(content), start + length)
        view = memoryview(content)
        for block in range(first + bool(begun), last + 1):
            at = block * BLOCK_BYTES - start
            expected = self._table[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
            piece = view[at : at + BLOCK_BYTES]
            if digest(piece) != expected:
                raise DamagedFileError(start + at, start + at + len(piece))
        content = begun + content if begun else content
        self._kept = (last, content[(last - first) * BLOCK_BYTES :])
        return content
