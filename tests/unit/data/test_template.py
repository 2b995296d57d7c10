"""Rows become text as models know it, and every token knows whether it is an answer, and whether the last."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import template as template_module
from orchestrator.data.formats import Conversation, Instruction, Malformed, Row, Text, Tokens, parse
from orchestrator.data.template import (
    CONTEXT,
    LAST_RESPONSE,
    RESPONSE,
    Encoded,
    Template,
    choose,
    encode,
    render,
)
from orchestrator.errors import SpecError
from orchestrator.paths import resolve

PLAIN = Instruction("Name a colour.", "", "Blue.")
WITH_INPUT = Instruction("Translate.", "bleu", "Blue {sic}.")
WITH_SYSTEM = Instruction("Name a colour.", "", "Blue.", "Be brief.")
WITH_HISTORY = Instruction("And one more.", "", "Red.", "Be brief.", (("Name a colour.", "Blue."),))

# In the style of Qwen and Hermes: calls and results are JSON and text between tags, results are user's turns.
TOOL_TEMPLATE = r"""
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
    {{- '# Tools\n\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}
        {{- message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if message.content or not loop.first -%}{{- '\n' -}}{%- endif -%}
            {{- '<tool_call>\n' -}}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
            {{- '\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
}
TOOL_ROWS = {
    "one call": [
        {"from": "human", "value": "How is the weather in Århus?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"town": "Århus"}}'},
        {"from": "observation", "value": '{"degrees": 12}'},
        {"from": "gpt", "value": "It has 12 degrees."},
        {"from": "human", "value": "Thank you."},
        {"from": "gpt", "value": "You are welcome."},
    ],
    "two calls at once": [
        {"from": "human", "value": "Is Rome warmer than Oslo?"},
        {
            "from": "function_call",
            "value": json.dumps(
                [{"name": "get_weather", "arguments": {"town": t}} for t in ("Rome", "Oslo")]
            ),
        },
        {"from": "observation", "value": "24"},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "Yes, by 15 degrees."},
    ],
    "a call for a call": [
        {"from": "human", "value": "Where am I, and how is the weather?"},
        {"from": "function_call", "value": '{"name": "locate", "arguments": "{}"}'},
        {"from": "observation", "value": "Oslo"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"town": "Oslo"}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "In Oslo, at 9 degrees."},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))


@pytest.fixture(scope="module")
def unmarked(tokenizer: Any) -> Any:
    """The tokenizer with the same template, which says nowhere what is to be learnt."""
    return with_template(tokenizer, without_marks(tokenizer.chat_template))


@pytest.fixture(scope="module")
def tool_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer with the tool template, marks and all."""
    own = with_template(tokenizer, TOOL_TEMPLATE)
    own.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return own


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> Any:
    """A tokenizer that writes spaces as sentencepiece does, and begins every text with <s> if it may."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    texts = ["name a colour and say why", "blue is the colour of the sky", "be brief and kind . , ? !"]
    backend.train_from_iterator(texts * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
            "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}"
            "{% endif %}{% endfor %}"
        ),
    )


class NoChat:
    """Stands for a base model's tokenizer."""

    chat_template = None
    bos_token = None
    eos_token = "</s>"


def with_template(tokenizer: Any, template: str | None) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def without_marks(template: str) -> str:
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def talk(*turns: str, system: str = "") -> Conversation:
    """Return a conversation whose turns are a question, an answer, a question and so on."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": turn})
    return Conversation(tuple(messages))


def encoded(row: Row, tokenizer: Any, template: Template = "chat") -> Encoded:
    (result,) = encode([row], tokenizer, template)
    assert isinstance(result, Encoded), result
    return result


def parts(row: Row, tokenizer: Any, template: Template = "chat") -> tuple[str, str, str]:
    """Return the decoded tokens of a row, of its earlier answers and of its last one."""
    result = encoded(row, tokenizer, template)
    return (
        tokenizer.decode(result.tokens),
        tokenizer.decode(result.tokens[result.turn == RESPONSE]),
        tokenizer.decode(result.tokens[result.turn == LAST_RESPONSE]),
    )


def refusal(row: Row, tokenizer: Any, template: Template = "chat") -> str:
    (result,) = encode([row], tokenizer, template)
    assert isinstance(result, Malformed), result
    return str(result)


# Alpaca's prompt


def test_alpaca_prompt_is_stanfords(tokenizer: Any) -> None:
    plain = render(PLAIN, "alpaca", tokenizer)
    assert plain.text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue.</s>"
    )
    assert [plain.text[start:end] for start, end in plain.answers] == ["Blue.</s>"]
    with_input = render(WITH_INPUT, "alpaca", tokenizer)
    assert with_input.text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nbleu\n\n### Response:\nBlue {sic}.</s>"
    )
    assert [with_input.text[start:end] for start, end in with_input.answers] == ["Blue {sic}.</s>"]
    assert render(WITH_SYSTEM, "alpaca", tokenizer).text.startswith("<s>Be brief.\n\nBelow is")


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
    assert "use template: chat" in refusal(WITH_HISTORY, tokenizer, "alpaca")


def test_which_template_is_used(tokenizer: Any) -> None:
    assert choose("auto", tokenizer) == "chat"
    assert choose("alpaca", tokenizer) == "alpaca"
    assert choose("chat", tokenizer) == "chat"
    assert choose("auto", NoChat()) == "alpaca"
    with pytest.raises(SpecError, match="has no chat template; use template: alpaca"):
        choose("chat", NoChat())


# Text, and what of it is learnt


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
    assert text == render(row, template, tokenizer).text
    assert (earlier, last) == ("", row.output + "</s>")


def test_the_rows_that_ship_are_learnt_exactly(tokenizer: Any) -> None:
    lines = resolve("builtin/alpaca_sample").read_bytes().splitlines()[:40]
    rows = [parse(line, "alpaca") for line in lines]
    for row, result in zip(rows, encode(rows, tokenizer, "chat"), strict=True):
        assert isinstance(row, Instruction)
        assert isinstance(result, Encoded)
        assert tokenizer.decode(result.tokens[result.turn > CONTEXT]) == row.output + "</s>"
        assert result.tokens[-1] == tokenizer.eos_token_id
        assert (np.diff(result.turn.astype(int)) >= 0).all()  # once an answer, an answer to the end


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
    by_marks, by_comparison = encoded(row, tokenizer), encoded(row, unmarked)
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


def test_a_template_without_marks_is_not_asked_for_any(
    unmarked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    write = template_module.render_jinja_template

    def watched(**options: Any) -> Any:
        asked.append(options["return_assistant_tokens_mask"])
        return write(**options)

    monkeypatch.setattr(template_module, "render_jinja_template", watched)
    encoded(PLAIN, unmarked)
    assert asked == [False, False]  # the whole, and what stands before the answer


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


def test_weights_that_cannot_be_told_from_the_marks_are_refused(tokenizer: Any) -> None:
    once = with_template(
        tokenizer,
        "{% generation %}{% for message in messages %}{{ message.content }}{% endfor %}{% endgeneration %}",
    )
    row = talk("Hi.", "Hello!", "A colour?", "Blue.")
    messages = [{**message, "weight": 0} if at == 1 else message for at, message in enumerate(row.messages)]
    assert "marks 1 answers for 2 messages" in refusal(Conversation(tuple(messages)), once)


# Tools


def tool_row(turns: list[dict[str, str]]) -> Conversation:
    tools = json.dumps([WEATHER, {"name": "locate", "parameters": {"type": "object", "properties": {}}}])
    row = parse({"conversations": turns, "system": "Help.", "tools": tools}, "sharegpt")
    assert isinstance(row, Conversation)
    return row


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_calls_and_answers_are_learnt_and_what_tools_return_is_not(tool_tokenizer: Any, name: str) -> None:
    row = tool_row(TOOL_ROWS[name])
    reference = tool_tokenizer.apply_chat_template(
        list(row.messages),
        tools=list(row.tools),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = np.array(reference["input_ids"]), np.array(reference["assistant_masks"], np.bool_)
    by_marks = encoded(row, tool_tokenizer)
    assert by_marks.tokens.tolist() == ids.tolist()
    assert (by_marks.turn > CONTEXT).tolist() == mask.tolist()

    by_comparison = encoded(row, with_template(tool_tokenizer, without_marks(TOOL_TEMPLATE)))
    assert by_comparison.tokens.tolist() == ids.tolist()
    learnt = by_comparison.turn > CONTEXT
    # All that the reference learns, and the one line break that the template writes after each answer's end.
    ends = mask & (ids == tool_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends.sum() == sum(message["role"] == "assistant" for message in row.messages)
    after = np.append(False, ends[:-1])
    assert learnt.tolist() == (mask | after).tolist()
    assert not (mask & after).any()
    assert tool_tokenizer.decode(ids[after]) == "\n" * int(ends.sum())
    same = ~after
    assert by_comparison.turn[same].tolist() == by_marks.turn[same].tolist()


def test_a_call_is_learnt_as_json_and_the_answer_after_it_is_the_last(tool_tokenizer: Any) -> None:
    text, earlier, last = parts(tool_row(TOOL_ROWS["a call for a call"]), tool_tokenizer)
    assert '"name": "get_weather"' in text.split("<|im_end|>")[0]
    assert earlier == (
        '<tool_call>\n{"name": "locate", "arguments": {}}\n</tool_call><|im_end|>'
        '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Oslo"}}\n</tool_call><|im_end|>'
    )
    assert last == "In Oslo, at 9 degrees.<|im_end|>"


def test_a_template_that_knows_no_tools_refuses_them(tokenizer: Any, unmarked: Any) -> None:
    turns = TOOL_ROWS["one call"]
    for each in (tokenizer, unmarked):
        assert "Unsupported role: tool" in refusal(tool_row(turns), each)
        assert "does not write the tool get_weather" in refusal(tool_row(turns[:2]), each)
        assert "does not write the tool get_weather" in refusal(tool_row([turns[0], turns[3]]), each)
        calls_only = Conversation(tool_row(turns[:2]).messages)
        assert "does not write the tool get_weather" in refusal(calls_only, each)


@pytest.mark.parametrize("function", [None, 5, "a name", {"name": 5}])
def test_a_tool_that_is_none_refuses_its_row_only(tool_tokenizer: Any, function: Any) -> None:
    row = Conversation(talk("Hi.", "Hello!").messages, ({"type": "function", "function": function},))
    refused, kept = encode([row, talk("Hi.", "Hello!")], tool_tokenizer, "chat")
    assert isinstance(refused, Malformed)
    assert isinstance(kept, Encoded)


# What is refused


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ 'abc'.index('x') }}", "substring not found"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_row_that_the_template_fails_on_is_refused(tokenizer: Any, statement: str, reason: str) -> None:
    failing = "{% if messages[0].content == 'bad' %}" + statement + "{% endif %}"
    own = with_template(tokenizer, failing + tokenizer.chat_template)
    bad, good = encode([talk("bad", "x"), talk("good", "x")], own, "chat")
    assert isinstance(bad, Malformed)
    assert "chat template refuses the row" in str(bad)
    assert reason in str(bad)
    assert isinstance(good, Encoded)


def test_an_answer_that_opens_a_conversation_is_learnt_without_its_header(
    tokenizer: Any, unmarked: Any
) -> None:
    row = Conversation(({"role": "assistant", "content": "bonjour"}, *talk("Hi.", "Hello!").messages))
    expected = ("<s><|assistant|>bonjour</s><|user|>Hi.<|assistant|>Hello!</s>", "bonjour</s>", "Hello!</s>")
    assert parts(row, tokenizer) == parts(row, unmarked) == expected


def test_a_template_that_drops_the_thinking_of_earlier_turns_is_followed(tokenizer: Any) -> None:
    template = without_marks(tokenizer.chat_template).replace(
        "{{- message['content'] + eos_token -}}",
        "{{- (message['content'] if loop.last else message['content'].split('</think>')[-1]) + eos_token -}}",
    )
    own = with_template(tokenizer, template)
    thoughts = talk("Hi.", "<think>A guest.</think>Hello!", "A colour?", "<think>Hm.</think>Blue.")
    assert parts(thoughts, own) == (
        "<s><|user|>Hi.<|assistant|>Hello!</s><|user|>A colour?<|assistant|><think>Hm.</think>Blue.</s>",
        "Hello!</s>",
        "<think>Hm.</think>Blue.</s>",
    )
    assert parts(talk("Hi.", "Hello!", "A colour?", "<think>Hm.</think>Blue."), own)[1:] == (
        "Hello!</s>",
        "<think>Hm.</think>Blue.</s>",
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    template = without_marks(tokenizer.chat_template).replace(
        "message['content'] + eos_token", "(message['content'] if loop.last else '...') + eos_token"
    )
    assert "once more follows answer 1" in refusal(
        talk("Hi.", "Hello!", "A colour?", "Blue."), with_template(tokenizer, template)
    )


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    own = with_template(
        tokenizer, "{{ 'prompt' if add_generation_prompt else 'another ' + messages[-1].content }}"
    )
    assert "cannot be told apart" in refusal(PLAIN, own)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_conversation_needs_a_chat_template(tokenizer: Any, template: Template) -> None:
    assert "the model's tokenizer has none" in refusal(
        talk("Hi.", "Hello!"), with_template(tokenizer, None), template
    )


# Tokens, and many rows at once


def test_tokens_pass_through(tokenizer: Any) -> None:
    last = len(tokenizer) - 1
    result = encoded(Tokens((7, last, 0, 7), (False, True, False, True)), tokenizer)
    assert result.tokens.tolist() == [7, last, 0, 7]
    assert result.turn.tolist() == [CONTEXT, LAST_RESPONSE, CONTEXT, LAST_RESPONSE]


def test_a_token_beyond_the_tokenizer_is_refused(tokenizer: Any) -> None:
    size = len(tokenizer)
    reason = refusal(Tokens((1, size, 2), (True,) * 3), tokenizer)
    assert f"token {size} is not in the tokenizer, whose tokens end at {size - 1}" in reason


def test_results_stand_where_their_rows_stood(tokenizer: Any) -> None:
    nobody = Conversation(({"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}))
    rows: list[Row] = [PLAIN, nobody, Tokens((1, 2), (False, True)), Text("Blue."), Tokens((2**31,), (True,))]
    results = encode([*rows, *rows[::-1]], tokenizer, "chat")
    assert [isinstance(each, Malformed) for each in results[:5]] == [False, True, False, False, True]
    for row, result, mirrored in zip(rows, results[:5], results[:4:-1], strict=True):
        if isinstance(result, Encoded):
            assert isinstance(mirrored, Encoded)
            alone = encoded(row, tokenizer)
            assert alone.tokens.tolist() == result.tokens.tolist() == mirrored.tokens.tolist()
            assert alone.turn.tolist() == result.turn.tolist() == mirrored.turn.tolist()
        else:
            assert str(mirrored) == str(result)
    assert encode([], tokenizer, "chat") == []


def test_truncation_and_padding_of_the_tokenizer_are_off(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=500)
    assert encoded(PLAIN, own).tokens.tolist() == encoded(PLAIN, tokenizer).tokens.tolist()


@pytest.mark.parametrize(
    "row",
    [
        talk("name a colour", "blue", "why ?", "the sky is blue ."),
        talk("name  a colour ", " blue"),
        talk("warum ?", "der Himmel"),
        Text(" blue .", "the sky is"),
        Text("the sky is blue ."),
    ],
)
def test_a_sentencepiece_tokenizer_writes_the_text_as_one(metaspace_tokenizer: Any, row: Any) -> None:
    rendered = render(row, "chat", metaspace_tokenizer)
    result = encoded(row, metaspace_tokenizer)
    whole = metaspace_tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert result.tokens.tolist() == whole["input_ids"]
    assert result.tokens.tolist().count(metaspace_tokenizer.bos_token_id) == 1
    # A token is learnt if the text that it stands for lies in an answer.
    in_answer = [
        any(start <= begin and stop <= end for start, end in rendered.answers)
        for begin, stop in whole["offset_mapping"]
    ]
    assert (result.turn > CONTEXT).tolist() == in_answer
    assert len(rendered.answers) == (result.tokens[result.turn > CONTEXT] == 2).sum()
