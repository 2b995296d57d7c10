"""Locates the answers in a conversation that a chat template has rendered.

The part of the text that each message wrote is known (`traced_template`). If the template has `{%
generation %}` marks, an answer is what they enclose in the part of its message. Otherwise it is the part
without the text that the generation prompt already contains at inference, which is found by rendering the
messages before the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError

from orchestrator.data.rows import Message
from orchestrator.data.traced_template import Traced, TracedTemplate

Span = tuple[int, int]
"""Half-open range of characters."""


@dataclass(frozen=True)
class Answer:
    """An answer in a rendered conversation.

    Attributes:
        message: Index of its message.
        spans: Its pieces, ascending and disjoint; several if the template marks an answer in pieces, none
        if it
            marks other answers but not this one.
        is_ended: Whether the last piece contains a token that ends the turn.
        follows_prompt: Whether the text before it ends with the whole generation prompt.
    """

    message: int
    spans: tuple[Span, ...]
    is_ended: bool
    follows_prompt: bool


class AnswerLocator:
    """Locates the answers of conversations that one template renders.

    Args:
        template: The template.
        ends: Texts of the tokens that end a generation.
        special: Texts of the special and added tokens of the tokenizer.
    """

    def __init__(self, template: TracedTemplate, ends: Iterable[str], special: Iterable[str]) -> None:
        self._template = template
        self._end = _any_of(ends)
        tokens = {*special, *ends}
        self._special = _any_of(tokens)
        self._border = re.compile(f"({self._special.pattern}|\n)")

    def locate(
        self,
        traced: Traced,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        learnt: Sequence[int],
    ) -> list[Answer] | None:
        """Return the answers of the messages with the given indices.

        Returns:
            The answers in order, or None if the parts of these messages are not known.
        """
        regions = [self._region(traced, at, at + 1 == len(messages)) for at in learnt]
        if not all(regions):
            return None
        if traced.generated:
            return [
                self._marked(traced, messages, at, region) for at, region in zip(learnt, regions, strict=True)
            ]
        return [
            self._unmarked(traced, messages, tools, at, region)
            for at, region in zip(learnt, regions, strict=True)
        ]

    @staticmethod
    def _region(traced: Traced, at: int, is_last: bool) -> list[Span]:
        """Return the parts of a message; the last message's part includes what follows the loop."""
        region = [(start, end) for start, end, message in traced.parts if message == at]
        if region and is_last and region[-1][1] == traced.parts[-1][1]:
            region[-1] = (region[-1][0], len(traced.text))
        return region

    def _marked(self, traced: Traced, messages: Sequence[Message], at: int, region: Sequence[Span]) -> Answer:
        spans = [
            (max(begin, start), min(stop, end))
            for begin, stop in traced.generated
            for start, end in region
            if max(begin, start) < min(stop, end)
        ]
        is_ended = bool(spans) and self._ends_turn(traced.text[slice(*spans[-1])], messages[at])
        return Answer(at, tuple(spans), is_ended, follows_prompt=True)

    def _unmarked(
        self,
        traced: Traced,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        at: int,
        region: Sequence[Span],
    ) -> Answer:
        text, (first, *others) = traced.text, region
        start, follows_prompt = self._start(traced, messages, tools, at, first)
        spans = [(start, first[1]), *others]
        begin, end = spans[-1]
        is_ended = self._ends_turn(text[begin:end], messages[at])
        if not is_ended and (token := re.compile(rf"\s*(?:{self._end.pattern})").match(text, end)):
            spans[-1], is_ended = (begin, token.end()), True  # the turn ends where the next one begins
        return Answer(at, tuple(span for span in spans if span[0] < span[1]), is_ended, follows_prompt)

    def _start(
        self,
        traced: Traced,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        at: int,
        part: Span,
    ) -> tuple[int, bool]:
        """Return where an answer begins, and whether the whole generation prompt precedes it.

        The generation prompt is compared up to the end of a special token or of a line, so that an answer
        with `<tool_call>` does not begin inside of it where the prompt has `<think>`.
        """
        text = traced.text
        prompt = self._prompt(messages, tools, at)
        if prompt is None:
            return part[0] + self._common_header(traced, messages, tools, at, part), True
        if part[0] <= len(prompt.text) and text.startswith(prompt.text):
            start = len(prompt.text)
            header = "" if start > part[0] else self._turn_header
            return start + len(header) * text.startswith(header, start), True
        # The messages before the answer were rewritten: compare what follows the last of them.
        tail = prompt.text[prompt.parts[-1][1] if prompt.parts else 0 :]
        start = part[0]
        for piece in self._border.split(tail):
            if not text.startswith(piece, start, part[1]):
                return start, False
            start += len(piece)
        return start, True

    def _prompt(self, messages: Sequence[Message], tools: Sequence[object] | None, at: int) -> Traced | None:
        """Return what the model reads before an answer; None if the template refuses to render it."""
        try:
            return self._template.trace(messages[:at], tools, generation_prompt=True)
        except (TemplateError, LookupError, TypeError, ValueError):
            return None

    @cached_property
    def _turn_header(self) -> str:
        """The generation prompt after a message of the user, which may follow tool results as well."""
        messages: list[Message] = [{"role": "user", "content": "a"}]
        prompt = self._prompt(messages, None, 1)
        if prompt is None or not prompt.parts:
            return ""
        return prompt.text[prompt.parts[-1][1] :]

    def _common_header(
        self,
        traced: Traced,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        at: int,
        part: Span,
    ) -> int:
        """Return the length of what precedes an answer in its part whatever its text is."""
        other: Message = {"role": "assistant", "content": "a" if messages[at]["content"][:1] == "b" else "b"}
        changed = self._template.trace([*messages[:at], other, *messages[at + 1 :]], tools)
        region = self._region(changed, at, at + 1 == len(messages))
        if not region:
            return 0
        length = 0
        for one, two in zip(traced.text[slice(*part)], changed.text[slice(*region[0])], strict=False):
            if one != two:
                break
            length += 1
        return length

    def _ends_turn(self, text: str, message: Message) -> bool:
        """Return whether an answer's last piece ends with a special token, or with text after its content."""
        ends = [token.end() for token in self._special.finditer(text)]
        if ends and not text[ends[-1] :].strip():
            return True
        content = (message["content"] or "").strip()
        after = text.rpartition(content)[2] if content else ""
        return not message.get("tool_calls") and bool(after.strip())


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of the tokens, the longest first; without tokens it matches nothing."""
    return re.compile(
        "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)"
    )
