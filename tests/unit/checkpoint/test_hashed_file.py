"""A part of a file is read and verified without the rest, and each flipped bit is found where it is read."""

from __future__ import annotations

import io
import random

import pytest

from orchestrator.checkpoint.hashed_file import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    DamagedFileError,
    HashingWriter,
    VerifiedReader,
    digest,
    read_table,
    table_bytes,
)

LENGTHS = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 17)


def written(content: bytes, pieces: random.Random | None = None) -> tuple[bytes, str]:
    """Return a file with its table, and the digest of the table; written in pieces of random length."""
    file = io.BytesIO()
    writer = HashingWriter(file)
    at = 0
    while at < len(content):
        length = pieces.randint(1, 3 * BLOCK_BYTES) if pieces else len(content)
        writer.write(memoryview(content)[at : at + length])
        at += length
    assert writer.length == len(content)
    table = writer.table()
    assert len(table) == table_bytes(len(content)) == -(-len(content) // BLOCK_BYTES) * DIGEST_BYTES
    return content + table, digest(table).hex()


def reader_of(file: bytes, length: int, table_digest: str) -> VerifiedReader:
    def read(start: int, count: int) -> bytes:
        return file[start : start + count]

    return VerifiedReader(read, length, read_table(read, length, table_digest))


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_do_not_change_the_digests(length: int) -> None:
    content = random.Random(length).randbytes(length)
    whole = written(content)
    for seed in range(5):
        assert written(content, random.Random(seed)) == whole


def test_any_range_is_read() -> None:
    dice, content = random.Random(1), random.Random(2).randbytes(LENGTHS[-1])
    reader = reader_of(*_with_length(content))
    for _ in range(200):
        start = dice.randrange(len(content))
        length = dice.randint(1, len(content) - start)
        assert b"".join(reader.read(start, length)) == content[start : start + length]


def _with_length(content: bytes) -> tuple[bytes, int, str]:
    file, table_digest = written(content)
    return file, len(content), table_digest


def test_consecutive_ranges_read_each_block_once() -> None:
    content = random.Random(3).randbytes(LENGTHS[-1])
    reader = reader_of(*_with_length(content))
    for start in range(0, len(content), 1000):
        assert b"".join(reader.read(start, min(1000, len(content) - start)))
    assert reader.bytes_read == len(content)


def test_a_flipped_bit_is_found_by_reads_that_touch_its_block_only() -> None:
    content = random.Random(4).randbytes(LENGTHS[-1])
    file, length, table_digest = _with_length(content)
    dice = random.Random(5)
    for _ in range(100):
        at = dice.randrange(length)
        damaged = bytearray(file)
        damaged[at] ^= 1 << dice.randrange(8)
        reader = reader_of(bytes(damaged), length, table_digest)
        block = at // BLOCK_BYTES
        with pytest.raises(DamagedFileError) as found:
            list(reader.read(at, 1))
        assert (found.value.start, found.value.end) == (
            block * BLOCK_BYTES,
            min((block + 1) * BLOCK_BYTES, length),
        )
        other = 0 if block else length - 1
        assert bytes(next(reader.read(other, 1))) == content[other : other + 1]


@pytest.mark.parametrize("what", ["flipped", "shortened"])
def test_a_damaged_table_is_found_when_the_file_is_opened(what: str) -> None:
    file, length, table_digest = _with_length(random.Random(6).randbytes(LENGTHS[-1]))
    damaged = bytearray(file)
    damaged[length + 3] ^= 1
    with pytest.raises(DamagedFileError, match="the table of digests is not what was written"):
        reader_of(bytes(damaged) if what == "flipped" else file[:-1], length, table_digest)
