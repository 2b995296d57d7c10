"""Renders rows with a chat template and tokenizes them, labelling every token as context or answer.

The character spans of the answers come from the template's `{% generation %}` marks or, for a template
without them, from a comparison of the conversation rendered with and without each answer. Each span is then
mapped to token positions, and the labels are stored per token so that `loss_on` can be chosen later.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from transformers.utils.chat_template_utils import render_jinja_template

from orchestrator.data.formats import Malformed
from orchestrator.data.rows import (
    Conversation,
    Instruction,
    Message,
    Row,
    Text,
    Tokens,
    has_content,
    is_learnt,
)
from orchestrator.data.token_positions import tokenize
from orchestrator.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Verbatim prompts of Stanford Alpaca: fine-tuned models and published results depend on the exact text.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Template = Literal["chat", "alpaca"]
CONTEXT, RESPONSE, LAST_RESPONSE = 0, 1, 2
"""Label of a token: outside every answer, in an answer before the last one, or in the last answer of the row.

The values are ordered, so `turn >= RESPONSE` selects all answers and `turn >= LAST_RESPONSE` only the last.
"""


@dataclass(frozen=True)
class Encoded:
    """A tokenized row before truncation.

    Attributes:
        tokens: Token ids, uint32, shape [length].
        turn: CONTEXT, RESPONSE or LAST_RESPONSE of each token, uint8, shape [length].
    """

    tokens: npt.NDArray[np.uint32]
    turn: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rendered:
    """A row rendered as text.

    Attributes:
        text: The complete text, including special tokens.
        answers: Half-open character ranges (start, end) of the trained answers, ascending and disjoint.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def choose(wanted: Literal["auto", "chat", "alpaca"], tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return the template for instruction rows; `auto` prefers the tokenizer's chat template.

    Raises:
        SpecError: `wanted` is `chat` and the tokenizer has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "chat" and not has_chat:
        raise SpecError(
            "data.chat_template=chat, but the tokenizer has no chat template; use chat_template: alpaca"
        )
    if wanted == "auto":
        return "chat" if has_chat else "alpaca"
    return wanted


def render(
    row: Conversation | Instruction | Text,
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    learn_ends: bool = False,
) -> Rendered:
    """Render a row as text and locate its answers.

    Args:
        row: A row that is not tokenized yet.
        template: Template for instruction rows. Conversations always use the chat template; plain text uses
            none.
        tokenizer: Provides the chat template and the special tokens.
        learn_ends: Whether the end-of-turn tokens of an empty answer in a conversation count as an answer.

    Raises:
        Malformed: The chat template raised an error, or the answers cannot be located in its output.
    """
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if isinstance(row, Text):
        return _joined(begin + row.prompt, row.completion + end)
    if isinstance(row, Conversation):
        return _chat(row, tokenizer, learn_ends)
    if template == "chat":
        return _chat(_as_conversation(row), tokenizer, learn_ends)
    if row.history:
        raise Malformed(
            "field history needs several turns, which chat_template: alpaca has not; use chat_template: chat"
        )
    body = _ALPACA_WITH_INPUT if row.input else _ALPACA_WITHOUT_INPUT
    prompt = body.format(instruction=row.instruction, input=row.input)
    prompt = f"{row.system}\n\n{prompt}" if row.system else prompt
    return _joined(begin + prompt, row.output + end)


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    learn_ends: bool = False,
) -> list[Encoded | Malformed]:
    """Tokenize rows without truncation.

    Token ids equal those of `tokenizer.apply_chat_template(..., tokenize=True)`: the whole conversation is
    tokenized at once, never turn by turn.

    Args:
        rows: Any number of rows.
        tokenizer: A fast Hugging Face tokenizer.
        template: The result of `choose`.
        learn_ends: See `render`.

    Returns:
        One entry per row, in order: its tokens, or the reason why it could not be tokenized.
    """
    results: list[Encoded | Malformed | Rendered] = []
    for row in rows:
        try:
            if isinstance(row, Tokens):
                results.append(_given(row, tokenizer))
            else:
                results.append(render(row, template, tokenizer, learn_ends))
        except Malformed as problem:
            results.append(problem)
    # borders[i] is the flat list [start 0, end 0, start 1, end 1, ...] of text i, in characters; `tokenize`
    # returns the same list in tokens.
    texts = [result for result in results if isinstance(result, Rendered)]
    borders = [[place for answer in each.answers for place in answer] for each in texts]
    encoded = iter(tokenize(tokenizer, [each.text for each in texts], borders))
    return [_mark(each, *next(encoded)) if isinstance(each, Rendered) else each for each in results]


def _mark(rendered: Rendered, tokens: npt.NDArray[np.uint32], borders: Sequence[int]) -> Encoded:
    """Label tokens by the answer that contains them.

    An answer starts at the token that contains its first character, so a token that spans the end of the
    prompt and the start of the answer belongs to the answer.

    Args:
        rendered: The text and its answers.
        tokens: Token ids, shape [length].
        borders: Token positions [start 0, end 0, start 1, end 1, ...], one pair per answer.
    """
    turn = np.zeros(len(tokens), np.uint8)
    for number, (first, stop) in enumerate(zip(borders[::2], borders[1::2], strict=True), start=1):
        turn[first:stop] = LAST_RESPONSE if number == len(rendered.answers) else RESPONSE
    return Encoded(tokens, turn)


def _given(row: Tokens, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    largest = max(row.ids)
    if largest >= len(tokenizer):
        raise Malformed(
            f"token {largest} is not in the tokenizer, whose tokens end at {len(tokenizer) - 1}; tokenise "
            "the data with this model's tokenizer"
        )
    turn = np.where(np.array(row.trained), np.uint8(LAST_RESPONSE), np.uint8(CONTEXT))
    return Encoded(np.array(row.ids, dtype=np.uint32), turn)


def _joined(prompt: str, answer: str) -> Rendered:
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _as_conversation(row: Instruction) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": row.system}] if row.system else []
    for question, answer in row.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row.output}]
    return Conversation(tuple(messages))


def _chat(row: Conversation, tokenizer: PreTrainedTokenizerFast, learn_ends: bool) -> Rendered:
    tools = [dict(tool) for tool in row.tools] or None
    try:
        source = tokenizer.get_chat_template(None, tools)
    except ValueError:
        raise Malformed(
            "a conversation needs a chat template, and the model's tokenizer has none; give the tokenizer one"
        ) from None
    writer = _Writer(source, tools, tokenizer.special_tokens_map, learn_ends)
    try:
        rendered = writer.marked(row) if _GENERATION.search(source) else None
        rendered = rendered or writer.compared(row)
        _require_tools_written(row, rendered.text)
    except Malformed:
        raise
    except Exception as error:  # a template is third-party Jinja code and can raise anything
        raise Malformed(
            f"the model's chat template refuses the row ({error}); change the row, or the template (rows of "
            "one instruction can also use data.chat_template: alpaca)"
        ) from None
    return rendered


@dataclass(frozen=True)
class _Writer:
    """Renders conversations with one chat template.

    Attributes:
        source: Jinja source of the template.
        tools: JSON schemas of the row's tools; None without tools.
        special: Special tokens by name (`bos_token`, `eos_token`, ...), as template variables.
        learn_ends: See `render`.
    """

    source: str
    tools: list[dict[str, object]] | None
    special: Mapping[str, object]
    learn_ends: bool

    def write(
        self, messages: Sequence[Message], marks: bool = False, add_generation_prompt: bool = False
    ) -> Any:
        # Annotated to return a string; it returns the texts and the spans of all conversations.
        render_all: Callable[..., Any] = render_jinja_template
        texts, spans = render_all(
            conversations=[[dict(each) for each in messages]],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **self.special,
        )
        return (texts[0], spans[0]) if marks else texts[0]

    def marked(self, row: Conversation) -> Rendered | None:
        """Locate answers by the template's `{% generation %}` marks; None if it marked nothing."""
        text, spans = self.write(row.messages, marks=True)
        if not spans:
            return None
        answers = [each for each in row.messages if each["role"] == "assistant"]
        spoken = [each for each in answers if has_content(each)]
        if len(spoken) == len(spans):  # some templates do not mark answers without text
            answers = spoken
        learnt = [is_learnt(each, self.learn_ends) for each in answers]
        if not all(learnt):
            if len(learnt) != len(spans):
                raise Malformed(
                    f"the chat template marks {len(spans)} answers for {len(learnt)} messages of the "
                    "assistant, so those that are not learnt (of weight 0, or empty) cannot be told; remove "
                    "the weights and the empty messages, or change the template"
                )
            spans = [span for span, is_learnt in zip(spans, learnt, strict=True) if is_learnt]
        return Rendered(text, tuple((start, end) for start, end in spans if end > start))

    def compared(self, row: Conversation) -> Rendered:
        """Locate answers by rendering prefixes of the conversation.

        Answer i starts where the rendered messages before it end (with the generation prompt) and ends where
        the rendered messages including it end. Templates that rewrite earlier answers are handled by
        `_end_when_rewritten`.

        Raises:
            Malformed: The template renders an answer differently once messages follow it, and its range in
                the whole text cannot be determined.
        """
        whole = self.write(row.messages)
        answers: list[tuple[int, int]] = []
        for at, message in enumerate(row.messages):
            if not is_learnt(message, self.learn_ends):
                continue
            answered = whole if at + 1 == len(row.messages) else self.write(row.messages[: at + 1])
            prompt = self._until_answer(row.messages, at, answered)
            if not (answered.startswith(prompt) and whole.startswith(prompt)):
                raise _hidden(len(answers) + 1)
            # The usual case: rendering does not change when messages are appended, so the answer ends with
            # its prefix of the conversation.
            end = len(answered) if whole.startswith(answered) else None
            end = end or _end_when_rewritten(whole, prompt, answered, message["content"].strip())
            if end is None:
                raise _hidden(len(answers) + 1)
            answers.append((len(prompt), end))
        return Rendered(whole, tuple(answers))

    def _until_answer(self, messages: Sequence[Message], at: int, answered: str) -> str:
        # Many templates reject an empty conversation, so the prompt of a first message is found as the common
        # prefix of two conversations whose answers start with different characters.
        if at == 0:
            other = "a" if messages[0]["content"].startswith("b") else "b"
            pairs = zip(answered, self.write([{"role": "assistant", "content": other}]), strict=False)
            return answered[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
        text: str = self.write(messages[:at], add_generation_prompt=True)
        if messages[at - 1]["role"] == "assistant" and not answered.startswith(text):
            text = self.write(messages[:at])  # the template merges consecutive assistant messages
        return text


def _end_when_rewritten(whole: str, prompt: str, answered: str, content: str) -> int | None:
    """Locate the end of an answer that the template shortens once messages follow it.

    Qwen3, for example, drops the reasoning of earlier answers. The remaining text must be a suffix of the
    answer's content, followed by the same end-of-turn text as when the answer is the last message.

    Args:
        whole: The whole rendered conversation.
        prompt: Rendered text before the answer, a prefix of `whole` and of `answered`.
        answered: The conversation rendered up to and including the answer.
        content: The stripped content of the answer.

    Returns:
        The end of the answer in `whole`, in characters; None if it cannot be located.
    """
    if not content:  # only the end-of-turn text remains: find the longest suffix of `answered` in `whole`
        ends = (answered[at:] for at in range(len(prompt), len(answered)))
        return next((len(prompt) + len(end) for end in ends if whole.startswith(end, len(prompt))), None)
    # `tail` is the end-of-turn text after the content; its first occurrence in `whole` after the prompt ends
    # the answer. `left` is what the template kept of the content, so it must be a suffix of the content.
    _, found, tail = answered[len(prompt) :].rpartition(content)
    end = whole.find(tail, len(prompt)) if content and found and tail else -1
    left = whole[len(prompt) : end].strip() if end >= 0 else ""
    return end + len(tail) if left and content.endswith(left) else None


def _hidden(number: int) -> Malformed:
    return Malformed(
        f"the model's chat template writes the conversation otherwise once more follows answer {number}, so "
        "the answer cannot be told apart; use a template with {% generation %} marks, or leave the row out"
    )


def _require_tools_written(row: Conversation, text: str) -> None:
    """Reject a rendered row that lacks the name of a tool or tool call.

    Templates without tool support ignore tools silently.

    Raises:
        Malformed: The name of an offered or called tool is missing from the text.
    """
    offered = [tool["function"]["name"] for tool in row.tools if "name" in tool.get("function", {})]
    called = [
        call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()
    ]
    for name in (*called, *offered):
        if name not in text:
            raise Malformed(
                f"the model's chat template does not write the tool {name}, so it would be trained without "
                "it; use a model or a chat template that knows tools, or remove the row"
            )
