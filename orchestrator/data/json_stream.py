"""Reads the rows of JSON arrays and JSON lines incrementally, in memory proportional to the largest row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Literal

_decode = json.JSONDecoder().raw_decode
_SPACE = " \t\n\r"
Entries = Iterator[tuple[int, object, int]]
"""Row or line number from 1, the row, and its approximate size in bytes."""


class JsonTextError(ValueError):
    """The text is not a valid JSON array; callers prefix the message with the file name."""


def rows(read: Callable[[], bytes]) -> tuple[Literal["row", "line"], Entries]:
    """Detect whether the text is a JSON array or JSON lines, and iterate over its rows.

    Args:
        read: Returns the next chunk of bytes; empty at the end.

    Returns:
        `row` and an iterator of parsed values for an array; `line` and an iterator of unparsed lines, as
        bytes, for JSON lines. Blank lines are counted, but not returned.

    Raises:
        JsonTextError: From the iterator, for an array that is not valid JSON or not UTF-8.
    """
    head = first_text(read)
    if head.lstrip().startswith(b"["):
        return "row", array_rows(TextBuffer(head, read))
    return "line", lines(head, read)


def first_text(read: Callable[[], bytes]) -> bytes:
    """Return the text up to the end of the chunk with the first character, without a byte order mark."""
    head = read()
    while head and not head.removeprefix(codecs.BOM_UTF8[: len(head)]).strip():
        more = read()
        head = head + more
        if not more:
            break
    return head.removeprefix(codecs.BOM_UTF8)


def lines(rest: bytes, read: Callable[[], bytes]) -> Entries:
    """Yield the lines of `rest` and of what follows it, as bytes, without blank ones."""
    number = 0
    while True:
        more = read()
        parts = (rest + more).split(b"\n") if more else [*rest.split(b"\n"), b""]
        rest = parts.pop()
        for line in parts:
            number += 1
            if line.strip():
                yield number, line, len(line)
        if not more:
            return


class TextBuffer:
    """A buffer over decoded text that is read on demand.

    Attributes:
        text: The buffered characters.
        at: Position of the next character to parse, in `text`.
        line: Line of that character, from 1.
        ended: Whether all of the input was read.
    """

    def __init__(self, head: bytes, read: Callable[[], bytes]) -> None:
        self._read, self._decoder = read, codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._append(head)

    def more(self) -> None:
        """Discard the parsed text and read at least one chunk.

        The buffer at least doubles, so re-parsing an incomplete row from its start after each call costs O(n)
        overall for a row of n characters.
        """
        self.text, self.at = self.text[self.at :], 0
        wanted = 2 * len(self.text)
        while not self.ended and (len(self.text) <= wanted or wanted == 0):
            before = len(self.text)
            self._append(self._read())
            if wanted == 0 and len(self.text) > before:
                return

    def _append(self, chunk: bytes) -> None:
        self.ended = not chunk
        try:
            self.text += self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            place = self._bytes + error.start
            raise JsonTextError(f"is not UTF-8 text (about byte {place}); convert it to UTF-8") from None
        self._bytes += len(chunk)

    def next_sign(self) -> str:
        """Skip white space and return the next character without consuming it; empty at the end."""
        while True:
            while self.at < len(self.text):
                sign = self.text[self.at]
                if sign not in _SPACE:
                    return sign
                self.line += sign == "\n"
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def value(self, where: str) -> tuple[object, int]:
        """Parse the value at the position, reading on as far as it goes, and move behind it.

        Args:
            where: The place in messages, such as `row 3`.

        Returns:
            The value, and its length in characters.

        Raises:
            JsonTextError: The text is not valid JSON.
        """
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except RecursionError as error:
                raise broken(where, str(error)) from None
            except ValueError as error:
                if self.ended or _is_final(error, self):
                    reason = _reason(error, self.at) if self.at < len(self.text) else "the text ends here"
                    raise broken(where, reason) from None
            else:
                # A number at the end of the buffer may be incomplete: 1 can continue as 1.5 or 1e+5. Two
                # characters after its end are enough to decide.
                if end + 2 < len(self.text) or self.ended:
                    break
            self.more()
        size = end - self.at
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value, size


def array_rows(text: TextBuffer, to_end: bool = True) -> Entries:
    """Yield the elements of the array that begins at the position.

    Args:
        text: The text; the position is before the array.
        to_end: Whether nothing may follow the array.

    Raises:
        JsonTextError: The array is not valid JSON.
    """
    text.next_sign()
    text.at += 1
    number = 0
    while True:
        sign = text.next_sign()
        if sign == "]" and number == 0:
            break
        number += 1
        value, size = text.value(f"row {number}")
        yield number, value, size
        sign = text.next_sign()
        if sign == "]":
            break
        if sign != ",":
            reason = f"{sign!r} where a comma belongs" if sign else "the text ends here"
            raise broken(f"row {number + 1}", reason)
        text.at += 1
    text.at += 1
    if to_end and text.next_sign():
        raise broken(f"row {number + 1}", "there is more after the end of the array")


def _is_final(error: ValueError, text: TextBuffer) -> bool:
    """Return whether a parse error is independent of the text that follows.

    Other errors may be caused by the end of the buffer. Without this check, an early error would be reported
    only after the whole file was read into the buffer.
    """
    # The longest literal and escape sequence: a token cut off by the end of the buffer fails within this many
    # characters of it. An unterminated string is the exception; its error is at the string's start.
    return (
        isinstance(error, json.JSONDecodeError)
        and not error.msg.startswith("Unterminated string")
        and error.pos + len("-Infinity\\u0000") < len(text.text)
    )


def _reason(error: ValueError, start: int) -> str:
    """Return the message of a parse error, with its position counted from the start of the row.

    Args:
        error: The error; its position counts from the start of the buffer, which moves.
        start: Position of the row in the buffer.
    """
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at its character {error.pos - start + 1}"


def broken(where: str, reason: str) -> JsonTextError:
    """Return the error for text that is not valid JSON at a row or line."""
    return JsonTextError(f"is not valid JSON ({where}: {reason}); repair it there")
