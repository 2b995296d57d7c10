"""Opens data files as UTF-8 text, whatever their compression, and refuses files that are not data.

A file of the wrong kind gives one error with the remedy, instead of one for every line.
"""

from __future__ import annotations

import codecs
import lzma
import re
from collections.abc import Callable
from typing import IO, cast

from pyarrow import fs

Read = Callable[[], bytes]
_CHUNK = 2**20
_HEAD = 4096
_UNPACK = "unpack it, and name a file or folder of its content"
_TABLES = {
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"ARROW1": "an Arrow file; end its name in .arrow",
}
_CONTENTS: dict[bytes, str] = {
    b"version https://git-lfs": "a pointer of Git LFS and not the data; run `git lfs pull` in its repository",
    b"PK\x03\x04": f"a ZIP archive; {_UNPACK}",
    b"7z\xbc\xaf'\x1c": f"a 7z archive; {_UNPACK}",
    b"Rar!\x1a\x07": f"a RAR archive; {_UNPACK}",
    b"\xd0\xcf\x11\xe0": "a document of an old version of Office; save it as .xlsx or .csv",
    b"%PDF": "a PDF document; write its text into a .txt or .jsonl file",
    b"SQLite format 3": "an SQLite database; export the table as CSV or JSON lines",
    b"\x93NUMPY": "a NumPy array; write its rows as JSON lines",
    b"\x89HDF": "an HDF5 file; write its rows as JSON lines or Parquet",
}
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# The longer marks first: UTF-32 begins as UTF-16 does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class ContentError(ValueError):
    """The content of a file is not what is read; callers prefix the message with the file name."""


def start_of(system: fs.FileSystem, path: str) -> bytes:
    """Return the first bytes of a file as they are stored."""
    with system.open_input_stream(path, compression=None) as stream:
        return _read_fully(stream, _HEAD)


def require_table(head: bytes) -> None:
    """Check that a file may be a table, so that the error for another kind of file names the kind.

    Raises:
        ContentError: It is of another kind.
    """
    for mark, codec in _CODECS.items():
        if head.startswith(mark):
            raise ContentError(f"is compressed ({codec}), unlike what its name says; unpack it")
    if reason := _wrong_kind(head, {}):
        raise ContentError(f"is {reason}")


def open_text(system: fs.FileSystem, path: str, compression: str | None) -> tuple[IO[bytes], Read]:
    """Open a file as UTF-8 text.

    Args:
        system: The file system.
        path: The path in it.
        compression: The codec by the file name; None detects it from the content.

    Returns:
        The stream, to close, and a function that returns the next chunk of text, empty at the end.

    Raises:
        ContentError: The file is not text, or is an archive, a table or a page.
    """
    codec = compression or _codec_of(start_of(system, path))
    if codec == "xz":
        raw = system.open_input_stream(path, compression=None)
        stream = cast("IO[bytes]", lzma.LZMAFile(raw))  # noqa: SIM115 (the caller closes it)
    else:
        stream = system.open_input_stream(path, compression=codec)
    try:
        head = _read_fully(stream, _CHUNK)
        encoding = _encoding_of(head)
        if encoding is None and (reason := _wrong_kind(head, _TABLES)):
            raise ContentError(f"is {reason}")
    except BaseException:
        stream.close()
        raise
    parts = [head]

    def read() -> bytes:
        return parts.pop() if parts else stream.read(_CHUNK)

    return stream, _decoded(read, encoding) if encoding else read


def _codec_of(head: bytes) -> str | None:
    return next((codec for mark, codec in _CODECS.items() if head.startswith(mark)), None)


def _wrong_kind(head: bytes, tables: dict[bytes, str]) -> str | None:
    """Return what a file is and the remedy, if its first bytes are not those of data."""
    for mark, reason in {**_CONTENTS, **tables}.items():
        if head.startswith(mark):
            if mark == b"PK\x03\x04" and b"[Content_Types].xml" in head[:_HEAD]:
                return "an Office document; end its name in .xlsx if it is a workbook, or save it as CSV"
            return reason
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if _PAGE.match(head.removeprefix(codecs.BOM_UTF8)):
        return (
            "a page of HTML or XML and not data, such as the page of an error or of a login; download the "
            "file itself (from the hub with `hf download`, or by a link with /resolve/ and not /blob/)"
        )
    if _PICKLE.match(head):
        return "a pickle of Python; write its rows as JSON lines"
    if tables and b"\0" in head[:_HEAD]:
        return "a binary file and not text; write its rows as JSON lines, Parquet or CSV"
    return None


def _encoding_of(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if a text is encoded so; None for anything else."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    start = head[: 512 - len(head) % 2]
    if len(start) >= 4:
        # Text of mostly ASCII characters: every second byte is zero.
        even, odd = start[::2].count(0), start[1::2].count(0)
        half = len(start) // 2
        if not even and odd > 0.7 * half:
            return "utf-16-le"
        if not odd and even > 0.7 * half:
            return "utf-16-be"
    return None


def _decoded(read: Read, encoding: str) -> Read:
    """Return a reader of UTF-8 for a reader of another encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()

    def read_utf8() -> bytes:
        while chunk := read():
            if text := decoder.decode(chunk):
                return text.encode()
        return decoder.decode(b"", final=True).encode()

    return read_utf8


def require_utf8(head: bytes) -> None:
    """Refuse lines of another encoding; a single line of it among others is a malformed row.

    Raises:
        ContentError: Of several lines with characters other than ASCII, none is UTF-8.
    """
    first, count = 0, 0
    for number, line in enumerate(head.splitlines(), start=1):
        if line.isascii():
            continue
        try:
            line.decode()
        except UnicodeDecodeError:
            first, count = first or number, count + 1
        else:
            return
    if count > 1:
        raise not_utf8(first)


def not_utf8(line: int) -> ContentError:
    """Return the error for text of another encoding, with the first line that shows it."""
    return ContentError(
        f"is not UTF-8 text (line {line}); convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
    )


def _read_fully(stream: IO[bytes], size: int) -> bytes:
    head = b""
    while len(head) < size and (chunk := stream.read(size - len(head))):
        head += chunk
    return head
