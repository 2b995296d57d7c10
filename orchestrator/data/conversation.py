"""Renders conversations with a chat template, locates answers, and rejects rows that it does not write."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from orchestrator.data.answer_spans import Answer, AnswerLocator, Span, common_length
from orchestrator.data.formats import Malformed
from orchestrator.data.rows import (
    REASONING_FIELDS,
    Conversation,
    Message,
    is_learnt,
    with_call_ids,
    with_text_arguments,
)
from orchestrator.data.traced_template import Traced, TracedTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_END, OTHER_PROMPT, NOT_MARKED = "answer_without_end", "other_generation_prompt", "answer_not_marked"
FEW_TOKENS = "fewer_than_3_learnt_tokens"
NOTES = {
    NO_END: "have an answer whose last learnt token ends no turn: the model is not taught to stop there; "
    "use data.append_eos: true, or a chat template that ends answers",
    OTHER_PROMPT: "have an answer that does not begin with what the generation prompt ends with",
    NOT_MARKED: "have an answer that the chat template does not mark as generated, which is not learnt",
    FEW_TOKENS: "have fewer than 3 learnt tokens",
}
"""What `pack` counts of rows that are trained on, by the name in its figures."""

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_Tools = list[dict[str, object]] | None


@dataclass(frozen=True)
class ChatSettings:
    """Settings of a chat template.

    Attributes:
        options: Variables of the template (`data.template_options`), as sorted pairs.
        ends: Texts of tokens that end a generation, besides the tokenizer's EOS token.
        system_prompt: System message of rows without one; empty for none.
        append_eos: Whether the tokenizer's EOS token follows a last answer that ends no turn.
    """

    options: tuple[tuple[str, object], ...] = ()
    ends: tuple[str, ...] = ()
    system_prompt: str = ""
    append_eos: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row rendered as text.

    Attributes:
        text: The complete text; special tokens that only the tokenizer adds are not in it.
        answers: Half-open character ranges (start, end) of the trained answers, ascending and disjoint.
        spans_of_last: How many of the ranges, at the end, are the last answer's.
        is_plain: Whether no chat template wrote the text, so that the tokenizer adds its BOS token.
        notes: What `pack` counts of the row.
    """

    text: str
    answers: tuple[Span, ...]
    spans_of_last: int = 1
    is_plain: bool = False
    notes: tuple[str, ...] = ()


def conversation_template(tokenizer: PreTrainedTokenizerFast, settings: ChatSettings) -> ConversationTemplate:
    """Return the renderer of a tokenizer's chat template; those of the last few are kept."""
    source = tokenizer.chat_template
    return _kept(
        tokenizer, settings, source if isinstance(source, str) else json.dumps(source, sort_keys=True)
    )


@lru_cache(maxsize=4)
def _kept(tokenizer: PreTrainedTokenizerFast, settings: ChatSettings, _: str) -> ConversationTemplate:
    return ConversationTemplate(tokenizer, settings)


class ConversationTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: Provides the template and the special tokens.
        settings: Options and ends of turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: ChatSettings) -> None:
        self._tokenizer = tokenizer
        self._variables = {**tokenizer.special_tokens_map, **dict(settings.options)}
        self._system_prompt = settings.system_prompt
        self._appended = tokenizer.eos_token or "" if settings.append_eos else ""
        self._ends = (*settings.ends, tokenizer.eos_token or "")
        self._special = [str(token) for token in tokenizer.get_added_vocab()]
        self._templates: dict[str, tuple[TracedTemplate, AnswerLocator]] = {}

    def render(self, row: Conversation, learn_ends: bool) -> Rendered:
        """Render a conversation and locate the answers to train on.

        Tool calls are given to the template in the forms that templates want, until one form is written.

        Raises:
            Malformed: The template refuses the row or leaves out a part of it, or the answers cannot be
                located.
        """
        if self._system_prompt and not any(each["role"] in ("system", "developer") for each in row.messages):
            row = replace(row, messages=({"role": "system", "content": self._system_prompt}, *row.messages))
        given: _Tools = [dict(tool) for tool in row.tools] or None
        template, locator = self._template(given)
        learnt = [at for at, message in enumerate(row.messages) if is_learnt(message, learn_ends)]
        refused: Malformed | None = None
        incomplete: Malformed | None = None
        for messages, tools in _forms(row.messages, given):
            try:
                traced = _traced(template, messages, tools)
            except Malformed as error:
                refused = refused or error
                continue
            try:
                _require_written(row, messages, traced, learnt)
            except Malformed as error:
                incomplete = incomplete or error
                continue
            answers = locator.locate(traced, messages, tools, learnt)
            if answers is None:
                answers = _by_prefixes(template, locator, traced.text, messages, tools, learnt)
            return _rendered(traced.text, answers, self._appended)
        problem = incomplete or refused
        assert problem is not None
        raise problem

    def depends_on(self, row: Conversation, field: str) -> bool:
        """Return whether the text of a conversation depends on a field of its messages."""
        tools: _Tools = [dict(tool) for tool in row.tools] or None
        template, _ = self._template(tools)
        without = [
            cast("Message", {name: value for name, value in message.items() if name != field})
            for message in row.messages
        ]
        try:
            return template.render(row.messages, tools) != template.render(without, tools)
        except Exception:  # it is needed, or the template wants tool calls in another form
            return True

    def compile(self) -> None:
        """Compile the template for rows without tools.

        Raises:
            jinja2.TemplateError: It is not valid Jinja.
        """
        self._template(None)

    def _template(self, tools: _Tools) -> tuple[TracedTemplate, AnswerLocator]:
        given = self._tokenizer.chat_template
        if isinstance(given, str) and (known := self._templates.get(given)):
            return known
        try:
            source = self._tokenizer.get_chat_template(None, tools)
        except ValueError:
            raise Malformed(
                "a conversation needs a chat template, and the model's tokenizer has none; set "
                "data.chat_template to the name or file of one"
            ) from None
        if source not in self._templates:
            template = TracedTemplate(source, self._variables)
            self._templates[source] = template, AnswerLocator(template, self._ends, self._special)
        return self._templates[source]


def _forms(messages: tuple[Message, ...], tools: _Tools) -> Iterator[tuple[tuple[Message, ...], _Tools]]:
    """Yield messages and tools as they are and then in the other forms that templates accept.

    Some templates loop over tools, whether there are any or not. Some need an id in each call, some
    concatenate the arguments as text, and some write calls only of a message whose content is null.
    """
    yield messages, tools
    if tools is None:
        yield messages, []
    if not any(message.get("tool_calls") for message in messages):
        return
    changes = (with_call_ids, with_text_arguments, _without_empty_content)
    for count in range(1, len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            changed = messages
            for change in chosen:
                changed = change(changed)
            yield changed, tools


def _without_empty_content(messages: Sequence[Message]) -> tuple[Message, ...]:
    changed = []
    for message in messages:
        copy = message.copy()
        if message.get("tool_calls") and not message["content"]:
            copy["content"] = cast("str", None)  # only the template reads it
        changed.append(copy)
    return tuple(changed)


def _traced(template: TracedTemplate, messages: Sequence[Message], tools: _Tools) -> Traced:
    try:
        return template.trace(messages, tools)
    except Exception as error:  # a template is third-party Jinja code and can raise anything
        raise Malformed(
            f"the model's chat template refuses the row ({error}); change the row, or the template (rows of "
            "one instruction can also use data.chat_template: alpaca)"
        ) from None


def _rendered(text: str, answers: Sequence[Answer], appended: str) -> Rendered:
    """Return the row, with `appended` at the end of the last answer if that ends no turn."""
    written = [answer for answer in answers if answer.spans]
    spans = [span for answer in written for span in answer.spans]
    is_ended = all(answer.is_ended for answer in written)
    if appended and written and not written[-1].is_ended:
        start, end = spans[-1]
        text = text[:end] + appended + text[end:]
        spans[-1] = (start, end + len(appended))
        is_ended = True
    problems = [
        (NO_END, not is_ended),
        (OTHER_PROMPT, any(not answer.follows_prompt for answer in written)),
        (NOT_MARKED, len(written) < len(answers)),
    ]
    return Rendered(
        text,
        tuple(spans),
        len(written[-1].spans) if written else 0,
        notes=tuple(note for note, applies in problems if applies),
    )


def _by_prefixes(
    template: TracedTemplate,
    locator: AnswerLocator,
    whole: str,
    messages: Sequence[Message],
    tools: _Tools,
    learnt: Sequence[int],
) -> list[Answer]:
    """Locate answers turn by turn, where the loops of the template do not tell the parts of the messages.

    Raises:
        Malformed: The template writes an earlier part of the conversation otherwise once more follows.
    """
    answers: list[Answer] = []
    for at in learnt:
        prompt = template.render(messages[:at], tools, generation_prompt=True)
        answered = template.render(messages[: at + 1], tools)
        for shorter, longer in ((prompt, answered), (answered, whole)):
            if not longer.startswith(shorter):
                raise _rewritten(len(answers) + 1, shorter, longer)
        is_ended = locator.ends_turn(answered[len(prompt) :], messages[at])
        answers.append(Answer(at, ((len(prompt), len(answered)),), is_ended, follows_prompt=True))
    return answers


def _rewritten(number: int, before: str, after: str) -> Malformed:
    same = common_length(before, after)
    shown = [repr(text[max(0, same - 20) : same + 40]) for text in (before, after)]
    return Malformed(
        f"the chat template writes the text before or in answer {number} as {shown[0]} and, once more "
        f"follows, as {shown[1]}, so the answer cannot be located; use a template with "
        "{% generation %} marks (data.chat_template), or leave the row out"
    )


def _require_written(
    row: Conversation, messages: Sequence[Message], traced: Traced, learnt: Sequence[int]
) -> None:
    """Reject a rendered row that lacks a tool, a call, or text of an answer that is to be learnt.

    The reasoning of an answer that is not the last may be missing: templates leave it out at inference too.

    Raises:
        Malformed: Something is missing.
    """
    for tool in row.tools:
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise Malformed(f"a tool has no function with a name ({tool}); correct field tools")
        if name not in traced.text:
            raise _tool_left_out(name)
    for at, message in enumerate(messages):
        if at not in learnt and "tool_calls" not in message:
            continue
        part = "".join([traced.text[start:end] for start, end, owner in traced.parts if owner == at])
        part = part or traced.text
        calls = Counter(call["function"]["name"] for call in message.get("tool_calls") or ())
        for name, count in calls.items():
            if name not in part:
                raise _tool_left_out(name)
            if (written := part.count(name)) < count:
                raise Malformed(
                    f"the chat template writes {written} of the {count} calls of {name} in message {at}; use "
                    "a chat template that writes parallel calls (data.chat_template), or give each call a "
                    "message of its own"
                )
        if at not in learnt:
            continue
        thoughts, texts = _texts(message)
        for text in texts:
            if not _contains(part, text):
                raise _text_left_out(learnt.index(at) + 1, "text", text, part)
        for thought in thoughts if at == learnt[-1] else ():
            if not _contains(part, thought):
                raise _text_left_out(learnt.index(at) + 1, "reasoning", thought, part)


def _texts(message: Message) -> tuple[list[str], list[str]]:
    """Return the reasoning and the other texts of an answer."""
    content = message["content"] or ""
    if len(message) == 2 and "think>" not in content:  # nothing but its role and its text
        return [], [content]
    thoughts = [*_THOUGHT.findall(content)]
    fields: Mapping[str, object] = message
    given = next((fields[name] for name in REASONING_FIELDS if fields.get(name)), None)
    if isinstance(given, str):
        thoughts.append(given)
    rest = _THOUGHT.sub("", content)
    before, closed, after = rest.rpartition("</think>")  # opened by the generation prompt
    return [*thoughts, *([before] if closed else [])], [after if closed else rest]


def _contains(part: str, text: str) -> bool:
    """Return whether a text is in a part, whatever white space is between its words."""
    return text.strip() in part or "".join(text.split()) in "".join(part.split())


def _tool_left_out(name: str) -> Malformed:
    return Malformed(
        f"the model's chat template does not write the tool {name}, so it would be trained without it; use a "
        "model or a chat template that knows tools, or remove the row"
    )


def _text_left_out(number: int, what: str, text: str, part: str) -> Malformed:
    shown, written = (" ".join(each.split())[:60] for each in (text, part))
    return Malformed(
        f"the chat template leaves out {what} of answer {number}: the row has {shown!r}, the template writes "
        f"{written!r}; use a chat template that writes it (data.chat_template), or remove it from the row"
    )
