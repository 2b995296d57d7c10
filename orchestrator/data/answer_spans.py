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
        """Return the parts of a message; some templates write the last message after their loop."""
        parts = [(start, end) for start, end, message in self.traced.parts if message == at]
        if not parts and self.traced.parts and at + 1 == len(self.messages):
            end = self.traced.parts[-1][1]
            rest = self.traced.text[end:]
            if rest.strip() and (self.messages[at]["content"] or "").strip() in rest:
                return [(end, len(self.traced.text))]
        return parts

    def is_followed_by_the_end(self, at: int) -> bool:
        """Return whether the last part of a message is followed by what the template writes at the end."""
        last = self.parts_of(at)[-1:]
        return at + 1 == len(self.messages) and bool(last) and last[0][1] == self.traced.parts[-1][1]


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
        traced, parts = conversation.traced, conversation.parts_of(at)
        if conversation.is_followed_by_the_end(at):
            parts[-1] = (parts[-1][0], len(traced.text))
        spans = [
            (max(begin, start), min(stop, end))
            for begin, stop in traced.generated
            for start, end in parts
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
        if conversation.is_followed_by_the_end(at):
            end += self._end_after(text[begin:end], text[end:], conversation.messages[at])
            spans[-1] = (begin, end)
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
        # The messages before the answer were rewritten: compare what follows the last of them. White space
        # between turns may differ, for example where one loop writes both.
        tail = self._tail(before, conversation.tools)
        begin = part[0] + _leading_space(text[slice(*part)]) if tail.strip() else part[0]
        start = begin
        for piece in self._border.split(tail.lstrip()):
            if not text.startswith(piece, start, part[1]):
                return (start if start > begin else part[0]), False
            start += len(piece)
        return start, True

    def _end_after(self, answer: str, rest: str, message: Message) -> int:
        """Return how many characters belong to the last answer of what the template writes at the end.

        These are a token that ends the generation, or any other if the answer has no end yet, but not the
        generation prompt, which some templates always write.
        """
        if self._turn_header.strip() and rest.rstrip().endswith(self._turn_header.rstrip()):
            rest = rest[: rest.rindex(self._turn_header.rstrip())]
        if self.ends_turn(answer, message):
            end = self._next_end.match(rest)
            return end.end() if end else 0
        token = self._special.search(rest)
        following = rest[token.end() :] if token else ""
        is_whole = not following.strip() or self._next_end.match(following)
        return len(rest) if token is None or is_whole else token.end()

    def _tail(self, messages: Sequence[Message], tools: Sequence[object] | None) -> str:
        """Return what follows the last message in the text that ends with the generation prompt."""
        prompt = self._template.trace(messages, tools, generation_prompt=True)
        tail = prompt.text[prompt.parts[-1][1] :] if prompt.parts else ""
        if tail.strip() or not prompt.parts:
            return tail
        without = self._template.trace(messages, tools)  # the loop itself may write the generation prompt
        end = without.parts[-1][1] if without.parts else 0
        is_inside = end < prompt.parts[-1][1] and prompt.text.startswith(without.text[:end])
        return prompt.text[end:] if is_inside else tail

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


def _leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())


def common_length(one: str, other: str) -> int:
    """Return the number of characters with which two texts begin alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _any_of(tokens: Iterable[str]) -> str:
    """Return a pattern of any of the tokens, the longest first; without tokens it matches nothing."""
    return "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)"
