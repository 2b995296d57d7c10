"""Renders chat templates and reports which message each part of the text comes from.

A chat template loops over the messages. `TracedTemplate` adds to each such loop, in the parsed template, an
output of an invisible tag at the start of its body and one after the loop; `{% generation %}` blocks are
tagged as well. The tags are removed from the rendered text, and their positions give the parts. The text
itself is that of `tokenizer.apply_chat_template`, because nothing but the tags is added to the template.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from orchestrator.data.rows import REASONING_FIELDS, Message

DEFAULT_DATE = "2026-01-01"
"""Date that templates write unless `data.template_options.date` is set: tokens must not change daily."""

# A tag begins with characters that no text contains: a Unicode noncharacter and a random number. "m" LOOP ":"
# MESSAGE begins the part of a message, "e" LOOP follows a loop, and "g" and "h" enclose what a template marks
# as generated.
_OPEN, _CLOSE = f"\ufdd0{secrets.token_hex(8)}", "\ufdd1"
_GENERATION = -1  # stands for `{% generation %}` among the numbers of loops
_TAG = re.compile(f"{_OPEN}([megh])(\\d*):?(\\d*){_CLOSE}")


@dataclass(frozen=True)
class Traced:
    """A rendered conversation and the origin of its parts, in characters, ascending.

    Attributes:
        text: The text.
        parts: (start, end, index of the message) of text that a loop wrote for a message.
        generated: (start, end) of text inside `{% generation %}` blocks.
    """

    text: str
    parts: tuple[tuple[int, int, int], ...]
    generated: tuple[tuple[int, int], ...]


class TracedTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        variables: Variables of the template besides messages and tools: special tokens by name and
            `data.template_options`. `date` is the date, YYYY-MM-DD, that `strftime_now` formats.
    """

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        self.source = source
        self._variables = {name: value for name, value in variables.items() if name != "date"}
        self._date = datetime.fromisoformat(str(variables.get("date", DEFAULT_DATE)))
        self._begun: set[int] = set()  # loops in captured blocks that have written a tag
        self._plain, self._tagged, self._captured = _compiled(source)

    def render(
        self, messages: Sequence[Message], tools: Sequence[object] | None, generation_prompt: bool = False
    ) -> str:
        """Return the text of a conversation, with the generation prompt at its end if requested."""
        return self._run(self._plain, messages, tools, generation_prompt)

    def trace(
        self, messages: Sequence[Message], tools: Sequence[object] | None, generation_prompt: bool = False
    ) -> Traced:
        """Return the text of a conversation and the origin of its parts.

        There are no parts if the template changes texts after a loop has written them, so that tags could
        change the output.
        """
        tagged = self._run(self._tagged, messages, tools, generation_prompt)
        traced = _without_tags(tagged)
        begun = self._begun | {_GENERATION} if traced.generated else self._begun
        if self._captured.isdisjoint(begun):
            return traced
        plain = self.render(messages, tools, generation_prompt)
        return traced if traced.text == plain else Traced(plain, (), ())

    def _run(
        self,
        template: Template,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        generation_prompt: bool,
    ) -> str:
        copies = []
        for at, message in enumerate(messages):
            copies.append(copy := _TracedMessage(_with_reasoning(message)))
            copy.trace_position = at
        self._begun.clear()
        return template.render(
            {
                "messages": copies,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": generation_prompt,
                "strftime_now": self._date.strftime,
                "_message_tag": self._message_tag,
                "_end_tag": self._end_tag,
                **self._variables,
            }
        )

    def _message_tag(self, loop: int, value: object) -> str:
        if not isinstance(value, _TracedMessage):
            return ""
        self._begun.add(loop)
        return f"{_OPEN}m{loop}:{value.trace_position}{_CLOSE}"

    def _end_tag(self, loop: int) -> str:
        return f"{_OPEN}e{loop}{_CLOSE}" if loop in self._begun else ""


class _TracedMessage(dict[str, Any]):
    """A message that knows its position; attributes are not seen by templates that loop over its keys."""

    __slots__ = ("trace_position",)
    trace_position: int


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return a copy of a message with its reasoning under all names that templates read."""
    copy: dict[str, Any] = dict(message)
    if len(copy) == 2:
        return copy
    reasoning = next((copy[name] for name in REASONING_FIELDS if copy.get(name) is not None), None)
    return copy if reasoning is None else {"thinking": reasoning, **copy, "reasoning_content": reasoning}


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Template, Template, frozenset[int]]:
    """Compile a template without and with tags.

    Returns:
        Both templates, and the loops inside blocks whose output goes through the template's own code, with
        `_GENERATION` if marks of generated text are inside such blocks.
    """
    compiled: Template = chat_template_utils._compile_jinja_template(source)
    environment: Environment = compiled.environment
    tagger = _Tagger()
    code = environment.compile(tagger.visit(environment.parse(source)))
    tagged = environment.template_class.from_code(environment, code, environment.make_globals(None))
    for template in (compiled, tagged):
        template.globals = dict(template.globals)  # each rendering copies them; a ChainMap copies slowly
    return compiled, tagged, frozenset(tagger.captured)


class _Tagger(NodeTransformer):
    """Adds outputs of tags to a parsed template; `captured` are the loops in macros and set blocks."""

    def __init__(self) -> None:
        self.captured: set[int] = set()
        self._loops = 0
        self._captures = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        loop = self._loops
        self._loops += 1
        if self._captures:
            self.captured.add(loop)
        self.generic_visit(node)
        message = _message_of(node)
        if message is None:
            return [node]
        if self._captures:  # a tag only for a message: the block's output may be changed
            node.body = [_call("_message_tag", nodes.Const(loop), message), *node.body]
            return [node, _call("_end_tag", nodes.Const(loop))]
        position = nodes.Getattr(message, "trace_position", "load")  # undefined for other values
        begin, end = (nodes.TemplateData(text) for text in (f"{_OPEN}m{loop}:", _CLOSE))
        node.body = [nodes.Output([begin, position, end]), *node.body]
        return [node, nodes.Output([nodes.TemplateData(f"{_OPEN}e{loop}{_CLOSE}")])]

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        if not isinstance(node.call.node, nodes.ExtensionAttribute):  # else it is {% generation %}
            return self._visit_capture(node)
        if self._captures:
            self.captured.add(_GENERATION)
        self.generic_visit(node)
        node.body = [_text("g"), *node.body, _text("h")]
        return node

    def _visit_capture(self, node: nodes.Node) -> nodes.Node:
        self._captures += 1
        self.generic_visit(node)
        self._captures -= 1
        return node

    visit_AssignBlock = visit_FilterBlock = visit_Macro = _visit_capture


def _message_of(node: nodes.For) -> nodes.Expr | None:
    """Return what may be a message in a loop's body: its variable, or an entry at this index."""
    if not isinstance(node.target, nodes.Name):
        return None
    variable = node.target.name
    if not (isinstance(node.iter, nodes.Call) and getattr(node.iter.node, "name", "") == "range"):
        return nodes.Name(variable, "load")
    for entry in node.find_all(nodes.Getitem):
        if isinstance(entry.node, nodes.Name) and getattr(entry.arg, "name", "") == variable:
            return nodes.Getitem(nodes.Name(entry.node.name, "load"), nodes.Name(variable, "load"), "load")
    return None


def _call(function: str, *arguments: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), list(arguments), [], None, None)])


def _text(tag: str) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(f"{_OPEN}{tag}{_CLOSE}")])


def _without_tags(tagged: str) -> Traced:
    """Remove the tags from a rendered text and convert them to parts."""
    texts: list[str] = []
    parts: list[tuple[int, int, int]] = []
    generated: list[tuple[int, int]] = []
    owners: list[tuple[str, int]] = []  # (loop, message) of the loops around a part, innermost last
    length = begun = done = 0
    for tag in _TAG.finditer(tagged):
        text = tagged[done : tag.start()]
        done = tag.end()
        if text and owners:
            # The latest message, whether a result is written in the loop of its call, or a call is looked up
            # in that of its result.
            _extend(parts, length, length + len(text), max(message for _, message in owners))
        texts.append(text)
        length += len(text)
        kind, loop, message = tag.groups()
        if kind == "g":
            begun = length
        elif kind == "h":
            generated.append((begun, length))
        else:
            if owners and owners[-1][0] == loop:
                owners.pop()
            if message:
                owners.append((loop, int(message)))
    texts.append(tagged[done:])
    return Traced("".join(texts), tuple(parts), tuple(generated))


def _extend(parts: list[tuple[int, int, int]], start: int, end: int, message: int) -> None:
    """Append a part, or extend the last one if it is the same message's and ends where this starts."""
    if parts and parts[-1][1:] == (start, message):
        start = parts.pop()[0]
    parts.append((start, end, message))
