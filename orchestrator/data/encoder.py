"""Texts into tokens, with the words that come again and again encoded once.

A tokenizer spends most of its time on words that it has seen before. Byte-level BPE tokenizers split a text
in front of every single space between two other characters, whatever stands around it, so the tokens of a
text are those of its parts, and parts can be remembered. The other tokenizers encode each text whole. Every
so many texts, both ways are compared; should they ever differ, texts are encoded whole from then on.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt

_CUT = re.compile(r"(?<=\S)(?= \S)")
_WORDS_KEPT = 500_000
_LONGEST_WORD = 32
_COMPARED_EVERY = 64
_AT_ONCE = 128  # texts whose words stay near the processor
# How the tokenizers whose splits were examined split a text: GPT-2's, and those of Llama 3, Qwen 2 and their
# like, all of which let a piece contain a space only in front or among other spaces.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}

Encoded = tuple[npt.NDArray[np.uint32], list[int]]


class Encoder:
    """A tokenizer that remembers words.

    Args:
        tokenizer: A fast Hugging Face tokenizer; its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._words: dict[str, list[int]] = {}
        backend = json.loads(self._backend.to_str())
        self.remembers = splits_before_spaces(backend)
        special = sorted((token["content"] for token in backend["added_tokens"]), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")

    def encode(self, texts: Sequence[str], marks: Sequence[Sequence[int]]) -> list[Encoded]:
        """Encode texts as they stand, without adding special tokens.

        Args:
            texts: The texts.
            marks: Places in each text, in characters, ascending.

        Returns:
            For each text its token ids, and for each mark the first token that holds that character or a
            later one.
        """
        if self.remembers:
            few = slice(0, None, _COMPARED_EVERY)
            if _same(self._by_words(texts[few], marks[few]), self._whole(texts[few], marks[few])):
                portions = [slice(at, at + _AT_ONCE) for at in range(0, len(texts), _AT_ONCE)]
                return [each for part in portions for each in self._by_words(texts[part], marks[part])]
            self.remembers = False
        return self._whole(texts, marks)

    def _whole(self, texts: Sequence[str], marks: Sequence[Sequence[int]]) -> list[Encoded]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(found.ids, dtype=np.uint32), [_token_at(found, place, len(text)) for place in places])
            for text, found, places in zip(texts, encodings, marks, strict=True)
        ]

    def _by_words(self, texts: Sequence[str], marks: Sequence[Sequence[int]]) -> list[Encoded]:
        parts = [self._parts(text) for text in texts]
        marked = [_locate(part, places) for part, places in zip(parts, marks, strict=True)]
        remembered: list[list[Any]] = [list(map(self._words.get, part)) for part in parts]
        new: dict[str, list[int]] = {}
        for part, pieces in zip(parts, remembered, strict=True):
            if None in pieces:
                new.update((word, []) for word, piece in zip(part, pieces, strict=True) if piece is None)
        encodings = self._backend.encode_batch(list(new), add_special_tokens=False)
        new = {word: encoding.ids for word, encoding in zip(new, encodings, strict=True)}
        results: list[Encoded] = []
        for part, pieces, places in zip(parts, remembered, marked, strict=True):
            if None in pieces:
                pieces = [new[word] if ids is None else ids for word, ids in zip(part, pieces, strict=True)]
            tokens = np.array(list(chain.from_iterable(pieces)), dtype=np.uint32)
            before = list(accumulate(map(len, pieces), initial=0)) if places else []
            first = [before[at] + (self._inside(part[at], inside) if inside else 0) for at, inside in places]
            results.append((tokens, first))
        if len(self._words) < _WORDS_KEPT:
            self._words.update((word, tokens) for word, tokens in new.items() if len(word) <= _LONGEST_WORD)
        return results

    def _parts(self, text: str) -> list[str]:
        """Return the parts of a text between special tokens, and these, cut in front of single spaces."""
        parts: list[str] = []
        for at, piece in enumerate(self._special.split(text)):  # every other one is a special token
            if at % 2:
                parts.append(piece)
            elif piece:
                parts += _CUT.split(piece)
        return parts or [""]

    def _inside(self, word: str, character: int) -> int:
        """Return the token of a word that holds one of its characters."""
        return _token_at(self._backend.encode(word, add_special_tokens=False), character, len(word))


def splits_before_spaces(backend: dict[str, Any]) -> bool:
    """Tell whether a tokenizer splits every text in front of a single space between two other characters.

    Args:
        backend: The tokenizer's tokenizer.json.
    """
    parts = (backend.get(name) or {} for name in ("model", "normalizer", "pre_tokenizer"))
    model, normalizer, splitter = parts
    stages = splitter.get("pretokenizers", [splitter])
    byte_level = stages[-1].get("type") == "ByteLevel" and not stages[-1].get("add_prefix_space", True)
    if len(stages) == 1:
        is_known = bool(stages[0].get("use_regex"))
    else:
        is_known = (
            len(stages) == 2
            and stages[0].get("type") == "Split"
            and stages[0].get("pattern", {}).get("Regex") in _SPLITS
            and stages[0].get("behavior") == "Isolated"
            and not stages[0].get("invert")
            and not stages[1].get("use_regex")
        )
    plain_model = model.get("type") == "BPE" and not model.get("dropout")
    looks_around = any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in backend.get("added_tokens", [])
    )
    plain_text = normalizer.get("type") in (None, "NFC")
    return byte_level and is_known and plain_model and plain_text and not looks_around


def _locate(parts: Sequence[str], places: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each place in a text the part that holds it, and the place in that part."""
    if not places:
        return []
    starts = list(accumulate(map(len, parts), initial=0))
    holders = [
        bisect_right(starts, place) - 1 for place in places
    ]  # the end of the text is a part of its own
    return [(holder, place - starts[holder]) for holder, place in zip(holders, places, strict=True)]


def _token_at(encoding: Any, character: int, length: int) -> int:
    """Return the token that holds a character, or the next one that is in any token."""
    for at in range(character, length):
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _same(first: Sequence[Encoded], second: Sequence[Encoded]) -> bool:
    return all(
        np.array_equal(one, other) and places == others
        for (one, places), (other, others) in zip(first, second, strict=True)
    )
