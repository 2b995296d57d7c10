"""Rows are rendered like transformers renders them, and tokens of answers are labelled."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.chat_template import (
    CONTEXT,
    LAST_RESPONSE,
    RESPONSE,
    Encoded,
    Template,
    choose,
    encode,
    render,
)
from orchestrator.data.formats import parse
from orchestrator.data.rows import Conversation, Instruction, Text, Tokens
from orchestrator.errors import SpecError
from tests.unit.data.talks import (
    PLAIN,
    WITH_HISTORY,
    WITH_INPUT,
    WITH_SYSTEM,
    NoChat,
    encoded,
    parts,
    refusal,
    talk,
    with_template,
    without_marks,
)

# Alpaca's prompt


def test_alpaca_prompt_is_stanfords(tokenizer: Any) -> None:
    plain = render(PLAIN, "alpaca", tokenizer)
    assert plain.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue.</s>"
    )
    assert [plain.text[start:end] for start, end in plain.answers] == ["Blue.</s>"]
    with_input = render(WITH_INPUT, "alpaca", tokenizer)
    assert with_input.text == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nbleu\n\n### Response:\nBlue {sic}.</s>"
    )
    assert [with_input.text[start:end] for start, end in with_input.answers] == ["Blue {sic}.</s>"]
    assert render(WITH_SYSTEM, "alpaca", tokenizer).text.startswith("Be brief.\n\nBelow is")


def test_braces_in_a_row_are_only_text() -> None:
    rendered = render(Instruction("{instruction} {0}", "{input}", "{}"), "alpaca", NoChat())
    assert "### Instruction:\n{instruction} {0}\n\n### Input:\n{input}\n\n" in rendered.text
    assert rendered.text.endswith("### Response:\n{}</s>")


def test_a_tokenizer_without_special_tokens_adds_none() -> None:
    class Bare(NoChat):
        eos_token = None

    text = render(PLAIN, "alpaca", Bare()).text
    assert text.startswith("Below")
    assert text.endswith("Blue.")


def test_history_has_no_place_in_alpacas_prompt(tokenizer: Any) -> None:
    assert "use chat_template: chat" in refusal(WITH_HISTORY, tokenizer, "alpaca")


def test_which_template_is_used(tokenizer: Any) -> None:
    def chosen(chat_template: str, own: Any) -> str:
        data = DataSpec(train=(SourceSpec(path="rows"),), chat_template=chat_template)
        return choose(data, ModelSpec(path="builtin/tiny-llama"), own).name

    assert chosen("auto", tokenizer) == "chat"
    assert chosen("alpaca", tokenizer) == "alpaca"
    assert chosen("chat", tokenizer) == "chat"
    assert chosen("auto", NoChat()) == "alpaca"
    with pytest.raises(SpecError, match="has no chat template; use chat_template: alpaca"):
        chosen("chat", NoChat())


# Rendered text and the answers in it


def test_chat_prompt_of_the_builtin_tokenizer(tokenizer: Any) -> None:
    assert render(PLAIN, "chat", tokenizer).text == "<s><|user|>Name a colour.<|assistant|>Blue.</s>"
    assert render(WITH_INPUT, "chat", tokenizer).text == (
        "<s><|user|>Translate.\nbleu<|assistant|>Blue {sic}.</s>"
    )
    assert render(WITH_HISTORY, "chat", tokenizer).text == (
        "<s><|system|>Be brief.<|user|>Name a colour.<|assistant|>Blue.</s>"
        "<|user|>And one more.<|assistant|>Red.</s>"
    )


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("row", [PLAIN, WITH_INPUT, WITH_SYSTEM])
def test_of_an_instruction_the_output_and_its_end_are_learnt(
    tokenizer: Any, row: Instruction, template: Template
) -> None:
    text, earlier, last = parts(row, tokenizer, template)
    begin = "<s>" if template == "alpaca" else ""  # the chat template writes it
    assert text == begin + render(row, template, tokenizer).text
    assert (earlier, last) == ("", row.output + "</s>")


def test_the_rows_that_ship_are_learnt_exactly(tokenizer: Any) -> None:
    lines = resolve("builtin/alpaca_sample").read_bytes().splitlines()[:40]
    rows = [parse(line, "alpaca") for line in lines]
    for row, result in zip(rows, encode(rows, tokenizer, "chat"), strict=True):
        assert isinstance(row, Instruction)
        assert isinstance(result, Encoded)
        assert tokenizer.decode(result.tokens[result.turn > CONTEXT]) == row.output + "</s>"
        assert result.tokens[-1] == tokenizer.eos_token_id
        # The labels never decrease: context first, then the answer up to the last token.
        assert (np.diff(result.turn.astype(int)) >= 0).all()


def test_history_is_turns_of_which_the_last_is_the_output(tokenizer: Any) -> None:
    assert parts(WITH_HISTORY, tokenizer)[1:] == ("Blue.</s>", "Red.</s>")


@pytest.mark.parametrize("marks", [True, False])
def test_of_a_conversation_all_answers_are_learnt_and_the_last_is_told_apart(
    tokenizer: Any, unmarked: Any, marks: bool
) -> None:
    row = talk("Hi.", "Hello!", "A colour?", "Blue.", "Why?", "The sky is.", system="Be brief.")
    text, earlier, last = parts(row, tokenizer if marks else unmarked)
    assert text == (
        "<s><|system|>Be brief.<|user|>Hi.<|assistant|>Hello!</s><|user|>A colour?<|assistant|>Blue.</s>"
        "<|user|>Why?<|assistant|>The sky is.</s>"
    )
    assert (earlier, last) == ("Hello!</s>Blue.</s>", "The sky is.</s>")


def test_what_follows_the_last_answer_is_not_learnt(tokenizer: Any, unmarked: Any) -> None:
    for each in (tokenizer, unmarked):
        text, earlier, last = parts(talk("Hi.", "Hello!", "Bye."), each)
        assert text == "<s><|user|>Hi.<|assistant|>Hello!</s><|user|>Bye."
        assert (earlier, last) == ("", "Hello!</s>")


def test_of_two_answers_in_a_row_both_are_learnt_without_their_header(tokenizer: Any, unmarked: Any) -> None:
    messages = [*talk("Hi.", "Hello!").messages, {"role": "assistant", "content": "Welcome."}]
    for each in (tokenizer, unmarked):
        assert parts(Conversation(tuple(messages)), each) == (
            "<s><|user|>Hi.<|assistant|>Hello!</s><|assistant|>Welcome.</s>",
            "Hello!</s>",
            "Welcome.</s>",
        )


def test_an_answer_that_goes_on_with_the_one_before_it_is_learnt(tokenizer: Any) -> None:
    joining = without_marks(tokenizer.chat_template).replace(
        "{{- '<|assistant|>' -}}",
        "{%- if loop.first or messages[loop.index0 - 1].role != 'assistant' -%}<|assistant|>{%- endif -%}",
        1,
    )
    messages = [*talk("Hi.", "Hello!").messages, {"role": "assistant", "content": "Welcome."}]
    assert parts(Conversation(tuple(messages)), with_template(tokenizer, joining)) == (
        "<s><|user|>Hi.<|assistant|>Hello!</s>Welcome.</s>",
        "Hello!</s>",
        "Welcome.</s>",
    )


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_of_a_text_the_completion_is_learnt(tokenizer: Any, template: Template) -> None:
    assert parts(Text("The sky is blue."), tokenizer, template) == (
        "<s>The sky is blue.</s>",
        "",
        "The sky is blue.</s>",
    )
    assert parts(Text(" Blue.", "Question: a colour?\nAnswer:"), tokenizer, template) == (
        "<s>Question: a colour?\nAnswer: Blue.</s>",
        "",
        " Blue.</s>",
    )


def test_arrays_have_the_types_of_the_store(tokenizer: Any) -> None:
    for row in (PLAIN, Tokens((1, 2), (False, True))):
        result = encoded(row, tokenizer)
        assert result.tokens.dtype == np.uint32
        assert result.turn.dtype == np.uint8


def test_no_token_stands_twice_at_the_start(tokenizer: Any) -> None:
    for template in ("alpaca", "chat"):
        tokens = encoded(PLAIN, tokenizer, template).tokens.tolist()
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert tokens.count(tokenizer.eos_token_id) == 1


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=80, deadline=None)
@given(st.lists(contents, min_size=2, max_size=7), st.one_of(st.just(""), contents))
def test_tokens_and_mask_are_those_of_transformers(
    tokenizer: Any, unmarked: Any, turns: list[str], system: str
) -> None:
    row = talk(*turns, system=system)
    messages = list(row.messages)
    reference = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    # learn_ends=True, because transformers also marks answers that are only white space.
    (by_marks,), (by_comparison,) = (
        encode([row], own, "chat", learn_ends=True) for own in (tokenizer, unmarked)
    )
    assert isinstance(by_marks, Encoded)
    assert isinstance(by_comparison, Encoded)
    assert by_marks.tokens.tolist() == reference["input_ids"]
    assert by_marks.tokens.tolist() == tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False
    )
    assert (by_marks.turn > CONTEXT).tolist() == [bool(each) for each in reference["assistant_masks"]]
    assert by_comparison.tokens.tolist() == by_marks.tokens.tolist()
    assert by_comparison.turn.tolist() == by_marks.turn.tolist()
    answers = [turn + "</s>" for turn in turns[1::2]]
    assert tokenizer.decode(by_marks.tokens[by_marks.turn == RESPONSE]) == "".join(answers[:-1])
    assert tokenizer.decode(by_marks.tokens[by_marks.turn == LAST_RESPONSE]) == answers[-1]


@pytest.mark.parametrize("marks", [True, False])
def test_an_answer_of_weight_0_is_not_learnt(tokenizer: Any, unmarked: Any, marks: bool) -> None:
    whole = talk("Hi.", "Hello!", "A colour?", "Blue.", "Why?", "The sky is.")
    for unlearnt, wanted in [
        ({1}, ("Blue.</s>", "The sky is.</s>")),
        ({3}, ("Hello!</s>", "The sky is.</s>")),
        ({5}, ("Hello!</s>", "Blue.</s>")),
        ({1, 5}, ("", "Blue.</s>")),
    ]:
        messages = [
            {**message, "weight": 0} if at in unlearnt else message
            for at, message in enumerate(whole.messages)
        ]
        found = parts(Conversation(tuple(messages)), tokenizer if marks else unmarked)
        assert found == (render(whole, "chat", tokenizer).text, *wanted)


def test_marks_around_several_messages_are_those_of_each(tokenizer: Any) -> None:
    once = with_template(
        tokenizer,
        "{% generation %}{% for message in messages %}{{ message.content }}{% endfor %}{% endgeneration %}",
    )
    row = talk("Hi.", "Hello!", "A colour?", "Blue.")
    messages = [{**message, "weight": 0} if at == 1 else message for at, message in enumerate(row.messages)]
    assert parts(row, once) == ("Hi.Hello!A colour?Blue.", "Hello!", "Blue.")
    assert parts(Conversation(tuple(messages)), once)[1:] == ("", "Blue.")
