"""Turning rows into text, and text into tokens that know which turn of the conversation they belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers.utils.chat_template_utils import render_jinja_template

from orchestrator.data.encoder import Encoder
from orchestrator.data.formats import Malformed
from orchestrator.data.rows import Conversation, Instruction, Row, Text, Tokens, has_content, is_learnt
from orchestrator.errors import SpecError

# Stanford Alpaca's two prompts, word for word: models and published tables depend on them.
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
"""What a token is: no answer, an answer with another one after it, or the last answer of its row."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised row, whole.

    Attributes:
        tokens: Token ids, uint32, shape [length].
        turn: CONTEXT, RESPONSE or LAST_RESPONSE for each token, uint8, shape [length].
    """

    tokens: npt.NDArray[np.uint32]
    turn: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: All of it, special tokens included.
        answers: Start and end of each part that is to be learnt, in characters, ascending.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def choose(wanted: Literal["auto", "chat", "alpaca"], tokenizer: Any) -> Template:
    """Return the template that is used.

    Raises:
        SpecError: A chat template is asked for and the tokenizer has none.
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
    row: Conversation | Instruction | Text, template: Template, tokenizer: Any, learn_ends: bool = False
) -> Rendered:
    """Return a row's text and which parts of it are answers.

    Args:
        row: A row that is not tokenised yet.
        template: Alpaca's prompt or the tokenizer's chat template, for instructions; conversations always
            take
            the chat template, and plain text takes none.
        tokenizer: Gives the chat template and the special tokens.
        learn_ends: Whether what ends an empty answer of a conversation is part of the answers.

    Raises:
        Malformed: The chat template refuses the row, or hides which part of it is the answer.
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
    tokenizer: Any,
    template: Template,
    encoder: Encoder | None = None,
    learn_ends: bool = False,
) -> list[Encoded | Malformed]:
    """Tokenise rows whole, exactly as the tokenizer writes a whole conversation.

    Args:
        rows: Any number of rows.
        tokenizer: A fast Hugging Face tokenizer.
        template: As `choose` returned it.
        encoder: The tokenizer with the words that it remembers of earlier rows.
        learn_ends: As `render` takes it.

    Returns:
        For each row its tokens, or why it has none.
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
    texts = [result for result in results if isinstance(result, Rendered)]
    borders = [[place for answer in each.answers for place in answer] for each in texts]
    encoded = iter((encoder or Encoder(tokenizer)).encode([each.text for each in texts], borders))
    return [_mark(each, *next(encoded)) if isinstance(each, Rendered) else each for each in results]


def _mark(rendered: Rendered, tokens: npt.NDArray[np.uint32], borders: Sequence[int]) -> Encoded:
    """Return tokens with their turns; an answer begins with the token that holds its first character."""
    turn = np.zeros(len(tokens), np.uint8)
    for number, (first, stop) in enumerate(zip(borders[::2], borders[1::2], strict=True), start=1):
        turn[first:stop] = LAST_RESPONSE if number == len(rendered.answers) else RESPONSE
    return Encoded(tokens, turn)


def _given(row: Tokens, tokenizer: Any) -> Encoded:
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
    messages = [{"role": "system", "content": row.system}] if row.system else []
    for question, answer in row.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row.output}]
    return Conversation(tuple(messages))


def _chat(row: Conversation, tokenizer: Any, learn_ends: bool) -> Rendered:
    tools = list(row.tools) or None
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
    except Exception as error:  # a template is a program of others and can fail in any way
        raise Malformed(
            f"the model's chat template refuses the row ({error}); change the row, or the template (rows of "
            "one instruction can also use data.chat_template: alpaca)"
        ) from None
    return rendered


@dataclass(frozen=True)
class _Writer:
    """A chat template with what every row of a tokenizer needs."""

    source: str
    tools: list[Mapping[str, Any]] | None
    special: Mapping[str, Any]
    learn_ends: bool

    def write(self, messages: Sequence[Mapping[str, Any]], marks: bool = False, **options: Any) -> Any:
        texts, spans = render_jinja_template(
            conversations=[[dict(each) for each in messages]],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=marks,
            **self.special,
            **options,
        )
        return (texts[0], spans[0]) if marks else texts[0]

    def marked(self, row: Conversation) -> Rendered | None:
        """Return the answers that the template marks itself; None where it marks none."""
        text, spans = self.write(row.messages, marks=True)
        if not spans:
            return None
        answers = [each for each in row.messages if each["role"] == "assistant"]
        spoken = [each for each in answers if has_content(each)]
        if len(spoken) == len(spans):  # a template may mark nothing where an answer has no text
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
        """Return the answers as what the template adds to a conversation when it is answered."""
        whole = self.write(row.messages)
        answers: list[tuple[int, int]] = []
        for at, message in enumerate(row.messages):
            if not is_learnt(message, self.learn_ends):
                continue
            answered = whole if at + 1 == len(row.messages) else self.write(row.messages[: at + 1])
            prompt = self._until_answer(row.messages, at, answered)
            if not (answered.startswith(prompt) and whole.startswith(prompt)):
                raise _hidden(len(answers) + 1)
            end = len(answered) if whole.startswith(answered) else None
            end = end or _end_when_rewritten(whole, prompt, answered, message["content"].strip())
            if end is None:
                raise _hidden(len(answers) + 1)
            answers.append((len(prompt), end))
        return Rendered(whole, tuple(answers))

    def _until_answer(self, messages: Sequence[Mapping[str, Any]], at: int, answered: str) -> str:
        if at == 0:  # nothing to ask the template for: what two different answers have in common is no answer
            other = "a" if messages[0]["content"].startswith("b") else "b"
            pairs = zip(answered, self.write([{"role": "assistant", "content": other}]), strict=False)
            return answered[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
        text: str = self.write(messages[:at], add_generation_prompt=True)
        if messages[at - 1]["role"] == "assistant" and not answered.startswith(text):
            text = self.write(messages[:at])  # an answer that goes on with the one before it
        return text


def _end_when_rewritten(whole: str, prompt: str, answered: str, content: str) -> int | None:
    """Return where an answer ends that the template shortens once more follows, as Qwen3 does with thinking.

    What is left of it must be the end of its content, and be followed by what follows it when it is the last.
    """
    if not content:  # all that is left is what ends the answer
        ends = (answered[at:] for at in range(len(prompt), len(answered)))
        return next((len(prompt) + len(end) for end in ends if whole.startswith(end, len(prompt))), None)
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
    """Refuse a template that leaves tools or their calls out, as one that knows no tools does silently."""
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
