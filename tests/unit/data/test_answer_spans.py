"""Answers are located whatever a chat template does with earlier turns, reasoning, tools and ends."""

from typing import Any

import pytest

from orchestrator.data.chat_template import Template, render
from orchestrator.data.conversation import NO_END, OTHER_PROMPT, ChatSettings
from orchestrator.data.formats import Malformed
from orchestrator.data.rows import Conversation, Message
from tests.unit.data.talks import WEATHER, talk, with_template

TWO_TURNS = talk("Name a colour.", "Blue.", "And a fruit?", "A plum.")
PLAIN = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# Only the last answer has a block for reasoning, and the generation prompt opens it.
THINKING = """
{%- for message in messages -%}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and loop.last -%}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n')
            if '</think>' in message.content else '' -%}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
EOS_AT_THE_END = PLAIN.replace("{%- endif -%}\n", "{%- else -%}{{- eos_token -}}{%- endif -%}\n")
PROMPT_OPENS_THINKING = PLAIN.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")
IN_PIECES = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content -}}{%- endgeneration -%}
        {%- generation -%}{{- '<|im_end|>\\n' -}}{%- endgeneration -%}
    {%- else -%}{{- message.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
NEXT_TURN_ENDS = """
{%- for message in messages -%}{{- '<|' + message.role + '|>\\n' + message.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
BY_INDEX = """
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for at in range(0, turns | length) -%}
    {%- set turn = turns[at] -%}
    {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CAPTURED = """
{%- macro turn(message) -%}
    {%- for part in [message] -%}{{- '\\n' + part.role + ': ' + part.content + '<|im_end|>' -}}{%- endfor -%}
{%- endmacro -%}
{%- set body -%}{%- for message in messages -%}{{- turn(message) -}}{%- endfor -%}{%- endset -%}
{{- body | trim -}}
{%- if add_generation_prompt -%}{{- '\\nassistant: ' -}}{%- endif -%}
"""
MEASURED = CAPTURED.replace("body | trim", "(body | length) ~ ' ' ~ body | trim")
COPIES = """
{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
    {%- set turns.all = turns.all + [message.role + ': ' + message.content + '<|im_end|>\\n'] -%}
{%- endfor -%}
{{- turns.all | join -}}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""


def learnt(row: Conversation, tokenizer: Any, template: str, **settings: Any) -> list[str]:
    """Return the spans of the answers."""
    rendered = render(row, Template("chat", ChatSettings(**settings)), with_template(tokenizer, template))
    assert rendered.text == expected_text(row, tokenizer, template)
    return [rendered.text[start:end] for start, end in rendered.answers]


def expected_text(row: Conversation, tokenizer: Any, template: str) -> str:
    text: str = with_template(tokenizer, template).apply_chat_template(
        [dict(message) for message in row.messages], tools=list(row.tools) or None, tokenize=False
    )
    return text


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        (PLAIN, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        (THINKING, ["Blue.<|im_end|>\n", "\n</think>\n\nA plum.<|im_end|>\n"]),
        (EOS_AT_THE_END, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n</s>"]),
        (PROMPT_OPENS_THINKING, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        (IN_PIECES, ["Blue.", "<|im_end|>\n", "A plum.", "<|im_end|>\n"]),
        (BY_INDEX, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        (CAPTURED, ["Blue.<|im_end|>", "A plum.<|im_end|>"]),
        (COPIES, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
    ],
)
def test_each_answer_begins_after_the_generation_prompt_and_includes_its_end(
    tokenizer: Any, template: str, spans: list[str]
) -> None:
    assert learnt(TWO_TURNS, tokenizer, template) == spans


def test_a_template_that_measures_its_own_output_is_not_changed(tokenizer: Any) -> None:
    """Tags would change the length that it writes, so the untagged text is used, and the row is refused."""
    with pytest.raises(Malformed, match="cannot be located"):
        learnt(TWO_TURNS, tokenizer, MEASURED)


def test_an_answer_in_pieces_is_one_answer(tokenizer: Any) -> None:
    rendered = render(TWO_TURNS, "chat", with_template(tokenizer, IN_PIECES))
    assert rendered.spans_of_last == 2
    unlearnt = Conversation(
        (TWO_TURNS.messages[0], {**TWO_TURNS.messages[1], "weight": 0}, *TWO_TURNS.messages[2:])
    )
    assert learnt(unlearnt, tokenizer, IN_PIECES) == ["A plum.", "<|im_end|>\n"]


def test_a_prompt_that_the_answer_does_not_continue_is_noted(tokenizer: Any) -> None:
    row = talk("Name a colour.", "Blue.")
    rendered = render(row, "chat", with_template(tokenizer, PROMPT_OPENS_THINKING))
    assert rendered.notes == (OTHER_PROMPT,)
    assert render(row, "chat", with_template(tokenizer, PLAIN)).notes == ()
    assert render(row, "chat", with_template(tokenizer, EOS_AT_THE_END)).notes == ()


def test_the_next_turn_ends_an_answer_if_the_model_stops_there(tokenizer: Any) -> None:
    assert learnt(TWO_TURNS, tokenizer, NEXT_TURN_ENDS) == ["Blue.", "A plum."]
    assert learnt(TWO_TURNS, tokenizer, NEXT_TURN_ENDS, ends=("<|user|>",)) == ["Blue.<|user|>", "A plum."]
    rendered = render(
        TWO_TURNS,
        Template("chat", ChatSettings(ends=("<|user|>",))),
        with_template(tokenizer, NEXT_TURN_ENDS),
    )
    assert rendered.notes == (NO_END,)  # the last answer


def test_a_last_answer_without_an_end_can_have_the_eos_token(tokenizer: Any) -> None:
    settings = Template("chat", ChatSettings(append_eos=True))
    changed = with_template(tokenizer, NEXT_TURN_ENDS)
    ended = render(TWO_TURNS, settings, changed)
    assert [ended.text[start:end] for start, end in ended.answers] == ["Blue.", "A plum.</s>"]
    plain = render(TWO_TURNS, "chat", changed)
    assert (plain.notes, ended.notes) == ((NO_END,), ())
    assert ended.text == plain.text + "</s>"
    for template in (PLAIN, EOS_AT_THE_END):  # these end their answers
        changed = with_template(tokenizer, template)
        assert render(TWO_TURNS, settings, changed) == render(TWO_TURNS, "chat", changed)


def test_eos_stands_before_what_follows_the_answer(tokenizer: Any) -> None:
    template = NEXT_TURN_ENDS + "{{ '\n--\n' }}"
    row = Conversation((*TWO_TURNS.messages, {"role": "user", "content": "Thanks."}))
    ended = render(row, Template("chat", ChatSettings(append_eos=True)), with_template(tokenizer, template))
    (_, last) = ended.answers
    assert ended.text[slice(*last)] == "A plum.</s>"
    assert ended.text[last[1] :].startswith("<|user|>\nThanks.")


def test_reasoning_of_earlier_answers_may_be_left_out_and_that_of_the_last_may_not(tokenizer: Any) -> None:
    row = talk("2+2?", "<think>2+2</think>Four.", "4+1?", "<think>\n4+1</think>\nFive.")
    assert learnt(row, tokenizer, THINKING) == ["Four.<|im_end|>\n", "4+1\n</think>\n\nFive.<|im_end|>\n"]
    silent = THINKING.replace("{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}", "")
    with pytest.raises(Malformed, match=r"leaves out reasoning of answer 2: the row has '4\+1'"):
        learnt(row, tokenizer, silent)


def test_reasoning_in_a_field_must_be_written(tokenizer: Any) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "4+1?"},
        {"role": "assistant", "content": "Five.", "reasoning_content": "4 and 1"},
    ]
    with pytest.raises(Malformed, match="leaves out reasoning of answer 1: the row has '4 and 1'"):
        learnt(Conversation(tuple(messages)), tokenizer, PLAIN)
    written = PLAIN.replace("message.content +", "(message.reasoning_content or '') + message.content +")
    assert learnt(Conversation(tuple(messages)), tokenizer, written) == ["4 and 1Five.<|im_end|>\n"]


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}
TOOL = {"type": "function", "function": WEATHER}
CALLS = """
{%- for tool in tools or [] -%}{{- tool.function.name + '\\n' -}}{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool_call>' + call.function.name + CALL + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def tool_row(*, content: str = "") -> Conversation:
    messages: list[Message] = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It has 12 degrees."},
    ]
    return Conversation(tuple(messages), (TOOL,))


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("(call.function.arguments | tojson)", '{"town": "Oslo"}'),
        ("call.function.arguments", '{"town": "Oslo"}'),  # concatenates: wants text
        (
            "('' if call.id[8] else 'no id') + call.function.arguments",
            '{"town": "Oslo"}',
        ),  # wants an id and text
    ],
)
def test_a_call_is_given_in_the_form_that_the_template_wants(
    tokenizer: Any, arguments: str, call: str
) -> None:
    rendered = render(tool_row(), "chat", with_template(tokenizer, CALLS.replace("CALL", arguments)))
    assert [rendered.text[start:end] for start, end in rendered.answers] == [
        f"<tool_call>get_weather{call}</tool_call><|im_end|>\n",
        "It has 12 degrees.<|im_end|>\n",
    ]


def test_a_call_that_is_written_only_without_content_is_written(tokenizer: Any) -> None:
    template = CALLS.replace("CALL", "(call.function.arguments | tojson)").replace(
        "in message.tool_calls or []", "in (message.tool_calls if message.content is none else [])"
    )
    rendered = render(tool_row(), "chat", with_template(tokenizer, template))
    assert rendered.text.count("get_weather{") == 1
    with pytest.raises(Malformed, match="does not write the tool get_weather"):
        render(tool_row(content="I look."), "chat", with_template(tokenizer, template))


def test_a_call_that_only_the_list_of_tools_names_is_left_out(tokenizer: Any) -> None:
    template = CALLS.replace("in message.tool_calls or []", "in []").replace("CALL", "''")
    with pytest.raises(Malformed, match="does not write the tool get_weather"):
        render(tool_row(), "chat", with_template(tokenizer, template))


def test_results_inside_the_turn_of_a_call_are_not_learnt(tokenizer: Any) -> None:
    """As in Gemma 4: the results that follow a call are written in its turn."""
    template = """
{%- for message in messages -%}
    {%- if message.role != 'tool' -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content -}}
        {%- for call in message.tool_calls or [] -%}{{- '<call>' + call.function.name -}}{%- endfor -%}
        {%- for at in range(loop.index0 + 1, messages | length) -%}
            {%- set next = messages[at] -%}
            {%- if message.tool_calls and next.role == 'tool' -%}{{- '<result>' + next.content -}}{%- endif
            -%}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
    template = "{%- for tool in tools or [] -%}{{- tool.function.name -}}{%- endfor -%}" + template
    rendered = render(tool_row(), "chat", with_template(tokenizer, template))
    spans = [rendered.text[start:end] for start, end in rendered.answers]
    assert spans[0] == "<call>get_weather"
    assert not any("<result>" in span for span in spans)
    assert "<result>12" in rendered.text


def test_dates_do_not_change_from_day_to_day(tokenizer: Any) -> None:
    own = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}" + PLAIN)
    assert render(TWO_TURNS, "chat", own).text.startswith("01 Jan 2026")
    settings = ChatSettings(options=(("date", "2024-07-26"),))
    assert render(TWO_TURNS, Template("chat", settings), own).text.startswith("26 Jul 2024")


def test_options_are_variables_of_the_template(tokenizer: Any) -> None:
    template = "{{ 'think' if enable_thinking else 'do not think' }}" + PLAIN
    settings = ChatSettings(options=(("enable_thinking", True),))
    own = with_template(tokenizer, template)
    assert render(TWO_TURNS, Template("chat", settings), own).text.startswith("think")
    assert render(TWO_TURNS, "chat", own).text.startswith("do not think")


def test_text_with_the_characters_of_tags_is_text(tokenizer: Any) -> None:
    row = talk("Hi.", "\ufdd0m0:0\ufdd1Hello.")
    assert learnt(row, tokenizer, PLAIN) == ["\ufdd0m0:0\ufdd1Hello.<|im_end|>\n"]


# The generation prompt is written in the loop, and white space before it differs from that of an answer.
PROMPT_IN_THE_LOOP = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
{{ '\n[bot]\n' + message.content + '<|im_end|>' }}
    {%- else %}
{{ '[' + message.role + ']\n' + message.content }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{ '\n[bot]\n' }}{%- endif %}
{%- endfor -%}
"""
PROMPT_ALWAYS = PLAIN.replace("{%- if add_generation_prompt -%}", "").replace("{%- endif -%}\n", "")
PROMPT_ALWAYS_ENDS_THINKING = PROMPT_ALWAYS.replace("assistant\\n'", "assistant\\n</think>\\n'")
TOOLS_UNCHECKED = "{%- for tool in tools -%}{{- tool.function.name + '\\n' -}}{%- endfor -%}" + PLAIN
LAST_AFTER_THE_LOOP = """
{%- set last = messages[-1] if messages[-1].role == 'assistant' else none -%}
{%- for message in messages -%}
    {%- if not (last and loop.last) -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if last -%}{{- '<|im_start|>assistant\\n<think>\\n' + last.content + '<|im_end|>\\n' -}}
{%- elif add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        (PROMPT_IN_THE_LOOP, ["Blue.<|im_end|>", "A plum.<|im_end|>"]),
        (PROMPT_ALWAYS, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        (PROMPT_ALWAYS_ENDS_THINKING, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        (LAST_AFTER_THE_LOOP, ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
    ],
)
def test_no_part_of_a_generation_prompt_is_learnt(tokenizer: Any, template: str, spans: list[str]) -> None:
    assert learnt(TWO_TURNS, tokenizer, template) == spans
    assert learnt(talk("Name a colour.", "Blue.", system="Be brief."), tokenizer, template) == spans[:1]


def test_a_template_that_loops_over_no_tools_gets_an_empty_list(tokenizer: Any) -> None:
    rendered = render(TWO_TURNS, "chat", with_template(tokenizer, TOOLS_UNCHECKED))
    assert [rendered.text[start:end] for start, end in rendered.answers] == [
        "Blue.<|im_end|>\n", "A plum.<|im_end|>\n",
    ]  # fmt: skip
    assert rendered.text == expected_text(TWO_TURNS, tokenizer, PLAIN)
    problem = talk("2+2?", "<think>hm</think>Four.")
    with pytest.raises(Malformed, match="leaves out reasoning"):
        render(problem, "chat", with_template(tokenizer, TOOLS_UNCHECKED.replace(
            "message.content +", "message.content.split('</think>')[-1] +")))  # fmt: skip


CALL_LOOKED_UP = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- for call in message.tool_calls or [] -%}
        {{- call.function.name ~ call.function.arguments -}}
    {%- endfor -%}
    {%- if message.role == 'tool' -%}
        {%- for other in messages -%}
            {%- if other.tool_calls -%}{{- other.tool_calls[0].function.name + ': ' -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def with_calls(*towns: str) -> Conversation:
    calls = [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"town": town}}}
        for town in towns
    ]
    messages: list[Any] = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": str(number)} for number, _ in enumerate(towns)),
        {"role": "assistant", "content": "Yes."},
    ]
    return Conversation(tuple(messages))


def test_what_a_result_repeats_of_its_call_is_not_learnt(tokenizer: Any) -> None:
    assert learnt(with_calls("Oslo", "Rome"), tokenizer, CALL_LOOKED_UP) == [
        "get_weather{'town': 'Oslo'}get_weather{'town': 'Rome'}<|im_end|>\n",
        "Yes.<|im_end|>\n",
    ]


def test_a_template_that_writes_only_the_first_call_is_refused(tokenizer: Any) -> None:
    first = with_template(
        tokenizer, CALL_LOOKED_UP.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    )
    assert render(with_calls("Oslo"), "chat", first).answers
    with pytest.raises(Malformed, match="writes 1 of the 2 calls of get_weather in message 1; use a chat"):
        render(with_calls("Oslo", "Rome"), "chat", first)
