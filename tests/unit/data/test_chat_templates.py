"""Third-party chat templates: tool calls, reasoning, and templates that are rejected."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from orchestrator.data.chat_template import (
    CONTEXT,
    LAST_RESPONSE,
    Encoded,
    Template,
    encode,
    render,
)
from orchestrator.data.formats import Malformed, parse
from orchestrator.data.rows import Conversation, Row, Text, Tokens
from tests.unit.data.talks import (
    PLAIN,
    TOOL_ROWS,
    TOOL_TEMPLATE,
    WEATHER,
    encoded,
    parts,
    refusal,
    talk,
    with_template,
    without_marks,
)

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
    # The tokens of the reference mask, plus the line break that the template writes after each <|im_end|>.
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


# Rejected rows and templates


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
    assert "leaves out text of answer 1: the row has 'Hello!'" in refusal(
        talk("Hi.", "Hello!", "A colour?", "Blue."), with_template(tokenizer, template)
    )


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    own = with_template(
        tokenizer, "{{ 'prompt' if add_generation_prompt else 'another ' + messages[-1].content }}"
    )
    reason = refusal(PLAIN, own)
    assert "as 'prompt' and, once more follows, as 'another Blue.'" in reason
    assert "cannot be located" in reason


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_conversation_needs_a_chat_template(tokenizer: Any, template: Template) -> None:
    assert "the model's tokenizer has none" in refusal(
        talk("Hi.", "Hello!"), with_template(tokenizer, None), template
    )


# Tokenized rows, and batches of rows


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
    whole = metaspace_tokenizer(
        rendered.text, add_special_tokens=rendered.is_plain, return_offsets_mapping=True
    )
    assert result.tokens.tolist() == whole["input_ids"]
    assert result.tokens.tolist().count(metaspace_tokenizer.bos_token_id) == 1
    # A token is trained if its characters lie within an answer.
    in_answer = [
        begin < stop and any(start <= begin and stop <= end for start, end in rendered.answers)
        for begin, stop in whole["offset_mapping"]
    ]
    assert (result.turn > CONTEXT).tolist() == in_answer
    assert len(rendered.answers) == (result.tokens[result.turn > CONTEXT] == 2).sum()
