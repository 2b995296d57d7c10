"""Rows become prompt and response, and the mask covers exactly the response and its end."""

from typing import Any, Literal

import numpy as np
import pytest

from orchestrator.data.source import Row, read_alpaca, resolve
from orchestrator.data.template import Document, Template, choose, texts, tokenize, truncate
from orchestrator.errors import SpecError

PLAIN = Row("Name a colour.", "", "Blue.")
WITH_INPUT = Row("Translate.", "bleu", "Blue {sic}.")
WITH_SYSTEM = Row("Name a colour.", "", "Blue.", "Be brief.")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))


class NoChat:
    """Stands for a base model's tokenizer."""

    chat_template = None
    bos_token = None
    eos_token = "</s>"


class Stubborn(NoChat):
    """Stands for a chat template that is written by `write`."""

    chat_template = "given"

    def __init__(self, write: Any) -> None:
        self.apply_chat_template = write


def test_alpaca_prompt_is_stanfords(tokenizer: Any) -> None:
    assert texts(PLAIN, "alpaca", tokenizer) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n",
        "Blue.</s>",
    )
    prompt, response = texts(WITH_INPUT, "alpaca", tokenizer)
    assert prompt == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nbleu\n\n### Response:\n"
    )
    assert response == "Blue {sic}.</s>"
    assert texts(WITH_SYSTEM, "alpaca", tokenizer)[0].startswith("<s>Be brief.\n\nBelow is")


def test_braces_in_a_row_are_only_text() -> None:
    row = Row("{instruction} {0}", "{input}", "{}")
    prompt, response = texts(row, "alpaca", NoChat())
    assert "### Instruction:\n{instruction} {0}\n\n### Input:\n{input}\n\n" in prompt
    assert response == "{}</s>"


def test_a_tokenizer_without_special_tokens_adds_none() -> None:
    class Bare(NoChat):
        eos_token = None

    prompt, response = texts(PLAIN, "alpaca", Bare())
    assert prompt.startswith("Below")
    assert response == "Blue."


def test_chat_prompt_of_the_builtin_tokenizer(tokenizer: Any) -> None:
    assert texts(PLAIN, "chat", tokenizer) == ("<s><|user|>Name a colour.<|assistant|>", "Blue.</s>")
    assert texts(WITH_INPUT, "chat", tokenizer)[0] == "<s><|user|>Translate.\nbleu<|assistant|>"
    assert texts(WITH_SYSTEM, "chat", tokenizer)[0].startswith("<s><|system|>Be brief.<|user|>")


def test_a_chat_template_that_rewrites_the_prompt_is_refused() -> None:
    def write(messages: list[Any], tokenize: bool, add_generation_prompt: bool = False) -> str:
        return "prompt" if add_generation_prompt else "another prompt and answer"

    with pytest.raises(SpecError, match=r"cannot be told apart; use data\.template: alpaca"):
        texts(PLAIN, "chat", Stubborn(write))


def test_a_chat_template_that_refuses_a_row_is_reported(tokenizer: Any) -> None:
    from jinja2 import TemplateError

    def write(messages: list[Any], **options: Any) -> str:
        if messages[0]["role"] == "system":
            raise TemplateError("System role not supported")
        return tokenizer.apply_chat_template(messages, **options)

    assert texts(PLAIN, "chat", Stubborn(write))[1] == "Blue.</s>"
    with pytest.raises(SpecError, match="refuses a row \\(System role not supported\\)"):
        texts(WITH_SYSTEM, "chat", Stubborn(write))


def test_which_template_is_used(tokenizer: Any) -> None:
    assert choose("auto", tokenizer) == "chat"
    assert choose("alpaca", tokenizer) == "alpaca"
    assert choose("chat", tokenizer) == "chat"
    assert choose("auto", NoChat()) == "alpaca"
    with pytest.raises(SpecError, match="has no chat template; use template: alpaca"):
        choose("chat", NoChat())


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_mask_is_exactly_the_response_and_its_end(tokenizer: Any, template: Template) -> None:
    rows = [PLAIN, WITH_INPUT, WITH_SYSTEM, *read_alpaca("builtin/alpaca_sample")[:40]]
    documents = tokenize(rows, tokenizer, template, "response")
    assert len(documents) == len(rows)
    for row, document in zip(rows, documents, strict=True):
        prompt, response = texts(row, template, tokenizer)
        assert tokenizer.decode(document.tokens) == prompt + response
        assert tokenizer.decode(document.tokens[document.trained]) == row.output + "</s>"
        assert document.tokens[-1] == tokenizer.eos_token_id
        assert document.trained[-1]
        assert (np.diff(document.trained.astype(int)) >= 0).all()  # once trained, trained to the end
        assert document.tokens.dtype == np.uint32
        assert document.trained.dtype == np.bool_


def test_loss_on_all_trains_every_token_but_the_first(tokenizer: Any) -> None:
    (document,) = tokenize([PLAIN], tokenizer, "chat", "all")
    assert not document.trained[0]
    assert document.trained[1:].all()


def test_no_token_stands_twice_at_the_start(tokenizer: Any) -> None:
    (document,) = tokenize([PLAIN], tokenizer, "chat", "response")
    assert list(document.tokens).count(tokenizer.bos_token_id) == 1
    assert list(document.tokens).count(tokenizer.eos_token_id) == 1


def test_special_tokens_are_only_those_that_the_template_writes() -> None:
    class Adding(NoChat):
        """Begins every text with token 1 unless it is told not to, as Llama's tokenizer does."""

        def __call__(self, texts: list[str], add_special_tokens: bool = True, **options: Any) -> Any:
            return {"input_ids": [[1] * add_special_tokens + [7] * len(text) for text in texts]}

    (found,) = tokenize([PLAIN], Adding(), "alpaca", "response")
    assert 1 not in found.tokens
    assert found.trained.sum() == len("Blue.</s>")


# Truncation


def document(length: int, prompt: int) -> Document:
    return Document(np.arange(length, dtype=np.uint32), np.arange(length) >= prompt)


@pytest.mark.parametrize("how", ["right", "left", "drop"])
@pytest.mark.parametrize("length", [9, 10])
def test_what_fits_is_not_touched(how: Literal["right", "left", "drop"], length: int) -> None:
    whole = document(length, 4)
    assert truncate(whole, 10, how) is whole


def test_right_keeps_the_start() -> None:
    cut = truncate(document(14, 4), 10, "right")
    assert cut is not None
    assert cut.tokens.tolist() == list(range(10))
    assert cut.trained.tolist() == [False] * 4 + [True] * 6


def test_left_keeps_the_end_and_does_not_train_what_has_nothing_before_it() -> None:
    whole = document(14, 2)
    cut = truncate(whole, 10, "left")
    assert cut is not None
    assert cut.tokens.tolist() == list(range(4, 14))
    assert cut.trained.tolist() == [False] + [True] * 9
    assert whole.trained[4]  # the original is left as it was


def test_drop_leaves_a_long_row_out() -> None:
    assert truncate(document(11, 4), 10, "drop") is None


def test_a_row_whose_response_is_cut_away_is_left_out() -> None:
    assert truncate(document(14, 10), 10, "right") is None
    kept = truncate(document(14, 9), 10, "right")
    assert kept is not None
    assert kept.trained.sum() == 1
    assert truncate(document(14, 13), 1, "left") is None  # its only trained token has nothing before it


def test_a_row_without_a_trained_token_is_left_out() -> None:
    assert truncate(document(5, 5), 10, "right") is None
    assert truncate(document(0, 0), 10, "right") is None
