"""Token ids are the tokenizer's for the whole text, and character offsets become token positions."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.config.paths import resolve
from orchestrator.data.token_positions import tokenize

SAMPLE = [json.loads(line)["output"] for line in resolve("builtin/alpaca_sample").read_text().splitlines()]
pieces = st.one_of(
    st.sampled_from(
        ["don't", "e\u0301", "\u0301", "日本語", "👩‍👩‍👧", "12 345", "...", "\u200b", "<s>", "<|user|>"]
    ),
    st.sampled_from([" ", "  ", "\n", " \n", "\t", "\u00a0", "\u3000", "\r\n", ""]),
    st.sampled_from(" ".join(SAMPLE[:20]).split()),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))
    return loaded


@settings(max_examples=300, deadline=None)
@given(text=st.lists(pieces, max_size=25).map("".join), data=st.data())
def test_an_offset_is_the_first_token_that_reaches_it(
    tokenizer: PreTrainedTokenizerFast, text: str, data: st.DataObject
) -> None:
    offsets = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
    ((ids, positions),) = tokenize(tokenizer, [text], [offsets])
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids.tolist() == expected["input_ids"]
    ends = [end for _, end in expected["offset_mapping"]]
    for offset, position in zip(offsets, positions, strict=True):
        reaching = [at for at, end in enumerate(ends) if end > offset]
        assert position == (reaching[0] if reaching else len(ids)), (offset, expected["offset_mapping"])


def test_more_texts_than_one_batch_stay_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = SAMPLE[:300]
    results = tokenize(tokenizer, texts, [[0, len(text)] for text in texts])
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids, _ in results] == expected
    assert [positions for _, positions in results] == [[0, len(ids)] for ids in expected]


def test_truncation_and_padding_of_an_earlier_call_have_no_effect(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer(SAMPLE[:2], truncation=True, max_length=4, padding="max_length")
    ((ids, _),) = tokenize(tokenizer, SAMPLE[:1], [[]])
    assert len(ids) > 4
    assert tokenizer.decode(ids) == SAMPLE[0]
