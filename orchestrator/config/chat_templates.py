"""Chat templates by name, for base models whose tokenizer has none (`data.chat_template`).

Each has the format of a model family that is often trained, with the tokens that it needs. A template of a
model is better: it also knows tools, reasoning and the model's own system prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
_GEMMA = """\
{{- bos_token or '' -}}
{%- set first = messages[0] -%}
{%- set system = first['content'] | trim + '\\n\\n' if first['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
_MISTRAL = """\
{{- bos_token or '' -}}
{%- set first = messages[0] -%}
{%- set system = first['content'] + '\\n\\n' if first['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'] | trim + (eos_token or '') -}}
    {%- else -%}
        {{- raise_exception('the template mistral has no messages of role ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""
_PHI3 = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
_ZEPHYR = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + (eos_token or '') + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template with the tokens that it needs.

    Attributes:
        source: Jinja source.
        tokens: Special tokens, added to the tokenizer if it lacks them.
        end: The token that ends an answer, which becomes the tokenizer's EOS token; empty to keep that.
    """

    source: str
    tokens: tuple[str, ...] = ()
    end: str = ""


NAMED: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "qwen": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": NamedTemplate(
        _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": NamedTemplate(_MISTRAL),
    "phi3": NamedTemplate(_PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "zephyr": NamedTemplate(_ZEPHYR),
}
"""The templates by name."""
