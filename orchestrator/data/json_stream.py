"""Rows of a JSON text of any size, with no more of it in memory than a row and a chunk."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

_SPACE = " \t\n\r"
Entries = Iterator[tuple[int, Any, int]]
"""Place of a row from 1, the row, and about how many bytes of text it was."""


class JsonTextError(ValueError):
    """The text is no JSON array; the message goes on from the name of the file."""


def rows(read: Callable[[], bytes]) -> tuple[Literal["row", "line"], Entries]:
    """Return the rows of a JSON array, parsed, or the lines of JSON lines, not yet parsed.

    Args:
        read: Returns the next bytes; none at the end.

    Raises:
        JsonTextError: From the iterator, where an array is broken.
    """
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
    """A window on a text that is read on demand."""

    def __init__(self, head: bytes, read: Callable[[], bytes]) -> None:
        self._read, self._decoder = read, codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self.text, self.at, self.ended = "", 0, False
        self._append(head)

    def more(self) -> None:
        """Read on: at least a chunk, and as much again as the window holds."""
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
        """Return the next character that is no space, without passing it; nothing at the end."""
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
                if end + 2 < len(text.text) or text.ended:  # 1 may go on as 1.5 or 1e+5
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
    """Tell whether a row is broken whatever follows, so that a file is not read to its end in vain."""
    return (
        isinstance(error, json.JSONDecodeError)
        and not error.msg.startswith("Unterminated string")
        and error.pos + len("-Infinity\\u0000") < len(text.text)
    )


def _reason(error: ValueError, start: int) -> str:
    """Return what is wrong with a row, and where, counted from its start: the window starts anywhere."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at its character {error.pos - start + 1}"


def _broken(number: int, reason: str) -> JsonTextError:
    return JsonTextError(f"is not valid JSON (row {number}: {reason}); repair it there")
