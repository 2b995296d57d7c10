"""Sample conversations, chat templates and helpers for the tests of chat templates."""

import copy
import json
from typing import Any

from orchestrator.data.chat_template import (
    LAST_RESPONSE,
    RESPONSE,
    Encoded,
    Template,
    TemplateName,
    encode,
)
from orchestrator.data.formats import Malformed
from orchestrator.data.rows import Conversation, Instruction, Row

PLAIN = Instruction("Name a colour.", "", "Blue.")
WITH_INPUT = Instruction("Translate.", "bleu", "Blue {sic}.")
WITH_SYSTEM = Instruction("Name a colour.", "", "Blue.", "Be brief.")
WITH_HISTORY = Instruction("And one more.", "", "Red.", "Be brief.", (("Name a colour.", "Blue."),))
# In the style of Qwen and Hermes: calls are JSON and results are text between tags; results are user turns.
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


class NoChat:
    """The tokenizer of a base model, without a chat template."""

    chat_template = None
    bos_token = None
    eos_token = "</s>"

    def __len__(self) -> int:
        return 0


def with_template(tokenizer: Any, template: str | None) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def without_marks(template: str) -> str:
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def talk(*turns: str, system: str = "") -> Conversation:
    """Return a conversation of alternating user and assistant turns, starting with the user."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": turn})
    return Conversation(tuple(messages))


def encoded(row: Row, tokenizer: Any, template: Template | TemplateName = "chat") -> Encoded:
    (result,) = encode([row], tokenizer, template)
    assert isinstance(result, Encoded), result
    return result


def parts(row: Row, tokenizer: Any, template: Template | TemplateName = "chat") -> tuple[str, str, str]:
    """Return the decoded text of all tokens of a row, of its earlier answers and of its last answer."""
    result = encoded(row, tokenizer, template)
    return (
        tokenizer.decode(result.tokens),
        tokenizer.decode(result.tokens[result.turn == RESPONSE]),
        tokenizer.decode(result.tokens[result.turn == LAST_RESPONSE]),
    )


def refusal(row: Row, tokenizer: Any, template: Template | TemplateName = "chat") -> str:
    (result,) = encode([row], tokenizer, template)
    assert isinstance(result, Malformed), result
    return str(result)
