"""The word cache does not change tokens: `Encoder` returns what the tokenizer returns for the whole text."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.config.paths import resolve
from orchestrator.data.encoder import _SPLITS, Encoder, splits_before_spaces

SAMPLE = [json.loads(line)["output"] for line in resolve("builtin/alpaca_sample").read_text().splitlines()]
SPECIAL = ["<|a|>", "<|a|>b", "</s>", "[X]"]
SEPARATORS = [" ", "  ", "\n", " \n", "\n ", "\t", "\u00a0", "\u3000", "\x1c", "\u200b", "\r\n", "\x85", ""]
WORDS = [
    "don't",
    "'s",
    "x1234",
    "12 345",
    "é",
    "e\u0301",
    "\u0301",
    "ﬁ",
    "日本語",
    "👩‍👩‍👧",
    "...",
    "A",
    "the",
    "_",
    "-1",
    "؀",
]


def trained(split: str | None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on SAMPLE; `split` is its pre-tokenizer pattern, None for GPT-2's."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    stages = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*stages, byte_level]) if stages else byte_level
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


TOKENIZERS = {
    "gpt2": lambda: trained(None),
    **{f"split {number}": lambda split=split: trained(split) for number, split in enumerate(sorted(_SPLITS))},
    "nfc": lambda: trained(sorted(_SPLITS)[0], normalizers.NFC()),
    "builtin": lambda: AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama"))),
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {name: Encoder(make()) for name, make in TOKENIZERS.items()}


pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(SEPARATORS),
    st.sampled_from([*SPECIAL, "<s>", "<|user|>"]),
    st.sampled_from(" ".join(SAMPLE[:20]).split()),
    st.text(max_size=4),
)
texts = (
    st.lists(pieces, max_size=25)
    .map("".join)
    .filter(lambda text: text.isprintable() or text.encode("utf-8", "ignore").decode() == text)
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(some=st.lists(texts, min_size=1, max_size=5), data=st.data())
def test_words_give_the_tokens_of_the_whole(
    encoders: dict[str, Encoder], name: str, some: list[str], data: st.DataObject
) -> None:
    encoder = encoders[name]
    marks = [sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3))) for text in some]
    whole, words = encoder._whole(some, marks), encoder._by_words(some, marks)
    for text, (one, places), (other, others) in zip(some, whole, words, strict=True):
        assert one.tolist() == other.tolist(), text
        assert places == others, text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_sample_is_encoded_by_words_and_alike_again_and_again(
    encoders: dict[str, Encoder], name: str
) -> None:
    encoder = encoders[name]
    marks = [[0, len(text) // 2, len(text)] for text in SAMPLE]
    first, second = encoder.encode(SAMPLE, marks), encoder.encode(SAMPLE, marks)
    assert encoder.remembers
    for found in (first, second):
        for (one, places), (other, others) in zip(encoder._whole(SAMPLE, marks), found, strict=True):
            assert np.array_equal(one, other)
            assert places == others
            assert other.dtype == np.uint32


def test_texts_are_encoded_whole_once_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(trained(None))
    expected = encoder._whole(SAMPLE, [[]] * len(SAMPLE))
    encoder._words = {word: [0] for word in encoder._parts(SAMPLE[0])}
    found = encoder.encode(SAMPLE, [[]] * len(SAMPLE))
    assert not encoder.remembers
    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(expected, found, strict=True))


def test_no_more_words_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.encoder._WORDS_KEPT", 10)
    encoder = Encoder(trained(None))
    for text in SAMPLE[:40]:
        encoder.encode([text], [[]])
    assert 10 <= len(encoder._words) < 200


def changed(**parts: Any) -> dict[str, Any]:
    backend = json.loads(trained(None).backend_tokenizer.to_str())
    return {**copy.deepcopy(backend), **parts}


REFUSED: dict[str, dict[str, Any]] = {
    "another model": {"model": {"type": "Unigram"}},
    "dropout": {"model": {"type": "BPE", "dropout": 0.1}},
    "a normalizer that rewrites": {"normalizer": {"type": "Lowercase"}},
    "no splitting": {"pre_tokenizer": None},
    "sentencepiece's spaces": {"pre_tokenizer": {"type": "Metaspace"}},
    "a space in front": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    "a split that nobody examined": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": ".+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }
    },
    "a token that takes spaces with it": {
        "added_tokens": [{"content": "<x>", "lstrip": True, "rstrip": False, "single_word": False}]
    },
    "a token with a space": {
        "added_tokens": [{"content": "a b", "lstrip": False, "rstrip": False, "single_word": False}]
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_tokenizers_are_left_alone(why: str) -> None:
    assert splits_before_spaces(changed())
    assert not splits_before_spaces(changed(**REFUSED[why]))
