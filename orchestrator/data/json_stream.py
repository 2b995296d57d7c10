"""Reads the rows of JSON arrays and JSON lines incrementally, in memory proportional to the largest row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Literal

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
    # Read up to the first character after a byte order mark and white space: "[" starts an array.
    head = read()
    while head and not head.removeprefix(codecs.BOM_UTF8[: len(head)]).strip():
        more = read()
        head = head + more
        if not more:
            break
    head = head.removeprefix(codecs.BOM_UTF8)
    if head.lstrip().startswith(b"["):
        return "row", _array(_Text(head, read))
    return "line", _lines(head, read)


def _lines(rest: bytes, read: Callable[[], bytes]) -> Entries:
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


class _Text:
    """A buffer over decoded text that is read on demand.

    Attributes:
        text: The buffered characters.
        at: Position of the next character to parse, in `text`.
        ended: Whether all of the input was read.
    """

    def __init__(self, head: bytes, read: Callable[[], bytes]) -> None:
        self._read, self._decoder = read, codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self.text, self.at, self.ended = "", 0, False
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
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()


def _array(text: _Text) -> Entries:
    decode = json.JSONDecoder().raw_decode
    text.next_sign()
    text.at += 1
    number = 0
    while True:
        sign = text.next_sign()
        if sign == "]" and number == 0:
            break
        number += 1
        while True:
            try:
                value, end = decode(text.text, text.at)
            except RecursionError as error:
                raise _broken(number, str(error)) from None
            except ValueError as error:
                if text.ended or _is_final(error, text):
                    reason = _reason(error, text.at) if sign else "the text ends here"
                    raise _broken(number, reason) from None
            else:
                # A number at the end of the buffer may be incomplete: 1 can continue as 1.5 or 1e+5. Two
                # characters after its end are enough to decide.
                if end + 2 < len(text.text) or text.ended:
                    break
            text.more()
        yield number, value, end - text.at
        text.at = end
        sign = text.next_sign()
        if sign == "]":
            break
        if sign != ",":
            raise _broken(number + 1, f"{sign!r} where a comma belongs" if sign else "the text ends here")
        text.at += 1
    text.at += 1
    if text.next_sign():
        raise _broken(number + 1, "there is more after the end of the array")


def _is_final(error: ValueError, text: _Text) -> bool:
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


def _broken(number: int, reason: str) -> JsonTextError:
    return JsonTextError(f"is not valid JSON (row {number}: {reason}); repair it there")
