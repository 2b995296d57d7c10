"""Locates the answers in a conversation that a chat template has rendered.

The part of the text that each message wrote is known (`traced_template`). If the template has `generation`
marks, an answer is what they enclose in the part of its message. Otherwise it is the part without the text
that the generation prompt already contains at inference, which is found by rendering the messages before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

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
        spans: Its pieces, ascending and disjoint; several if the template marks an answer in pieces, none if
            it marks other answers but not this one.
        is_ended: Whether the last piece contains a token that ends the turn.
        follows_prompt: Whether the text before it ends with the whole generation prompt.
    """

    message: int
    spans: tuple[Span, ...]
    is_ended: bool
    follows_prompt: bool


@dataclass(frozen=True)
class _Conversation:
    """A rendered conversation, and what the template was given."""

    traced: Traced
    messages: Sequence[Message]
    tools: Sequence[object] | None

    def parts_of(self, at: int) -> list[Span]:
        """Return the parts of a message; those of the last message include what follows the loop."""
        parts = [(start, end) for start, end, message in self.traced.parts if message == at]
        is_last = at + 1 == len(self.messages)
        if parts and is_last and parts[-1][1] == self.traced.parts[-1][1]:
            parts[-1] = (parts[-1][0], len(self.traced.text))
        return parts


class AnswerLocator:
    """Locates the answers of conversations that one template renders.

    Args:
        template: The template.
        ends: Texts of the tokens that end a generation.
        special: Texts of the special and added tokens of the tokenizer.
    """

    def __init__(self, template: TracedTemplate, ends: Iterable[str], special: Iterable[str]) -> None:
        self._template = template
        ends = tuple(ends)
        self._next_end = re.compile(rf"\s*(?:{_any_of(ends)})")
        self._special = re.compile(_any_of({*special, *ends}))
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
        conversation = _Conversation(traced, messages, tools)
        if not all(conversation.parts_of(at) for at in learnt):
            return None
        find = self._marked if traced.generated else self._unmarked
        return [find(conversation, at) for at in learnt]

    def _marked(self, conversation: _Conversation, at: int) -> Answer:
        traced = conversation.traced
        spans = [
            (max(begin, start), min(stop, end))
            for begin, stop in traced.generated
            for start, end in conversation.parts_of(at)
            if max(begin, start) < min(stop, end)
        ]
        last = traced.text[slice(*spans[-1])] if spans else ""
        return Answer(at, tuple(spans), self.ends_turn(last, conversation.messages[at]), follows_prompt=True)

    def _unmarked(self, conversation: _Conversation, at: int) -> Answer:
        text = conversation.traced.text
        first, *others = conversation.parts_of(at)
        start, follows_prompt = self._start(conversation, at, first)
        spans = [(start, first[1]), *others]
        begin, end = spans[-1]
        is_ended = self.ends_turn(text[begin:end], conversation.messages[at])
        if not is_ended and (token := self._next_end.match(text, end)):
            spans[-1], is_ended = (begin, token.end()), True  # the turn ends where the next one begins
        return Answer(at, tuple(span for span in spans if span[0] < span[1]), is_ended, follows_prompt)

    def _start(self, conversation: _Conversation, at: int, part: Span) -> tuple[int, bool]:
        """Return where an answer begins, and whether the whole generation prompt precedes it.

        The generation prompt is compared up to the end of a special token or of a line, so that an answer
        with `<tool_call>` does not begin inside of it where the prompt has `<think>`.
        """
        text, before = conversation.traced.text, conversation.messages[:at]
        try:
            prompt = self._template.render(before, conversation.tools, generation_prompt=True)
        except (TemplateError, LookupError, TypeError, ValueError):  # some templates refuse to begin so
            return part[0] + self._common_header(conversation, at, part), True
        if part[0] <= len(prompt) and text.startswith(prompt):
            header = "" if len(prompt) > part[0] else self._turn_header
            return len(prompt) + len(header) * text.startswith(header, len(prompt)), True
        # The messages before the answer were rewritten: compare what follows the last of them.
        start = part[0]
        for piece in self._border.split(self._tail(before, conversation.tools)):
            if not text.startswith(piece, start, part[1]):
                return start, False
            start += len(piece)
        return start, True

    def _tail(self, messages: Sequence[Message], tools: Sequence[object] | None) -> str:
        """Return what follows the last message in the text that ends with the generation prompt."""
        prompt = self._template.trace(messages, tools, generation_prompt=True)
        return prompt.text[prompt.parts[-1][1] :] if prompt.parts else ""

    @cached_property
    def _turn_header(self) -> str:
        """The generation prompt after a message of the user, which may follow tool results as well."""
        messages: list[Message] = [{"role": "user", "content": "a"}]
        try:
            return self._tail(messages, None)
        except (TemplateError, LookupError, TypeError, ValueError):
            return ""

    def _common_header(self, conversation: _Conversation, at: int, part: Span) -> int:
        """Return the length of what precedes an answer in its part whatever its text is."""
        messages = conversation.messages
        other: Message = {"role": "assistant", "content": "a" if messages[at]["content"][:1] == "b" else "b"}
        changed = [*messages[:at], other, *messages[at + 1 :]]
        traced = self._template.trace(changed, conversation.tools)
        parts = _Conversation(traced, changed, conversation.tools).parts_of(at)
        text = traced.text[slice(*parts[0])] if parts else ""
        return common_length(conversation.traced.text[slice(*part)], text)

    def ends_turn(self, text: str, message: Message) -> bool:
        """Return whether an answer's last piece ends with a special token, or with text after its content."""
        ends = [token.end() for token in self._special.finditer(text)]
        if ends and not text[ends[-1] :].strip():
            return True
        content = (message["content"] or "").strip()
        after = text.rpartition(content)[2] if content else ""
        return not message.get("tool_calls") and bool(after.strip())


def common_length(one: str, other: str) -> int:
    """Return the number of characters with which two texts begin alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _any_of(tokens: Iterable[str]) -> str:
    """Return a pattern of any of the tokens, the longest first; without tokens it matches nothing."""
    return "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)"
