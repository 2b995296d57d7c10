"""Tokenizes texts and converts character offsets to token positions, with the library's `encode_batch`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_TEXTS_AT_ONCE = 128  # an Encoding holds ids, offsets and strings: about 100 bytes for each token


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], offsets: Sequence[Sequence[int]]
) -> list[tuple[npt.NDArray[np.uint32], list[int]]]:
    """Tokenize texts without special tokens, truncation or padding, and convert character offsets.

    Args:
        tokenizer: A fast Hugging Face tokenizer; its truncation and padding are disabled.
        texts: The texts.
        offsets: For each text, character offsets in it.

    Returns:
        For each text its token ids, shape [tokens], and for each offset the position of the first token that
        contains this character or a later one; the number of tokens if there is none.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    results = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        batch = slice(start, start + _TEXTS_AT_ONCE)
        encodings = backend.encode_batch(texts[batch], add_special_tokens=False)
        for text, encoding, characters in zip(texts[batch], encodings, offsets[batch], strict=True):
            ids = np.frombuffer(array("I", encoding.ids), np.uint32)
            results.append((ids, [_token_at(encoding, at, len(text)) for at in characters]))
    return results


def _token_at(encoding: Encoding, character: int, length: int) -> int:
    """Return the position of the token that contains a character, or else the next character in a token."""
    for at in range(character, length):
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
    return len(encoding.ids)
