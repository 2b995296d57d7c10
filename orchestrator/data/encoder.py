"""Tokenizes texts with a cache of the tokens of frequent words.

Byte-level BPE tokenizers with a known pre-tokenizer split a text before every single space between two other
characters, independent of the context. The tokens of a text are therefore the concatenated tokens of its
parts, and the tokens of a part can be cached. All other tokenizers encode each text directly. One text in 64
is encoded both ways as a check; after a mismatch the cache is no longer used.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_CUT = re.compile(r"(?<=\S)(?= \S)")
_WORDS_KEPT = 500_000
_LONGEST_WORD = 32
_COMPARED_EVERY = 64
_AT_ONCE = 128  # texts per batch, few enough for their words to fit into the CPU cache
# Pre-tokenizer patterns that were verified to split before single spaces: those of Llama 3, Qwen 2 and models
# with the same pattern. In each, a match contains a space only at its start or within a run of white space.
# GPT-2's pattern is built into the ByteLevel pre-tokenizer (`use_regex`).
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}

Encoded = tuple[npt.NDArray[np.uint32], list[int]]


class Encoder:
    """A tokenizer with a cache of the tokens of words.

    Args:
        tokenizer: A fast Hugging Face tokenizer; its truncation and padding are disabled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._words: dict[str, list[int]] = {}
        backend = json.loads(self._backend.to_str())
        self.remembers = splits_before_spaces(backend)
        special = sorted((token["content"] for token in backend["added_tokens"]), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")

    def encode(self, texts: Sequence[str], marks: Sequence[Sequence[int]]) -> list[Encoded]:
        """Encode texts without adding special tokens, and convert character offsets to token positions.

        Args:
            texts: The texts.
            marks: Character offsets in each text, ascending.

        Returns:
            For each text its token ids, uint32, shape [tokens], and for each offset the position of the first
            token that contains this character or a later one; the number of tokens if there is none.
        """
        if self.remembers:
            # The first text of every batch is always checked, so short batches do not escape the comparison.
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
        # parts[i] are the words of text i, marked[i] its offsets as (word, character in the word), and
        # remembered[i] the cached token ids of each word, None for words that are not in the cache.
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
        """Split a text into special tokens and the texts between them, the latter also at single spaces."""
        parts: list[str] = []
        for at, piece in enumerate(self._special.split(text)):  # odd entries are special tokens
            if at % 2:
                parts.append(piece)
            elif piece:
                parts += _CUT.split(piece)
        return parts or [""]

    def _inside(self, word: str, character: int) -> int:
        """Return the position, within a word's tokens, of the token that contains a character of the word."""
        return _token_at(self._backend.encode(word, add_special_tokens=False), character, len(word))


def splits_before_spaces(backend: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer splits every text before each single space between two other characters.

    Only known configurations qualify: byte-level BPE without dropout, a verified pre-tokenizer, no normalizer
    except NFC, and no added token that contains a space or strips the white space around it.

    Args:
        backend: The parsed tokenizer.json.
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
    """Convert character offsets in a text to pairs (part, offset in the part).

    The end of the text is offset 0 of a part after the last one.
    """
    if not places:
        return []
    starts = list(accumulate(map(len, parts), initial=0))  # shape [parts + 1]
    holders = [bisect_right(starts, place) - 1 for place in places]
    return [(holder, place - starts[holder]) for holder, place in zip(holders, places, strict=True)]


def _token_at(encoding: Encoding, character: int, length: int) -> int:
    """Return the position of the token that contains a character, or else the next character in a token."""
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
