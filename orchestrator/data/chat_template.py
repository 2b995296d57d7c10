"""Renders rows as text and tokenizes them, labelling every token as context or answer.

The character spans of the answers in a conversation come from `conversation.py`. Each span is then mapped to
token positions, and the labels are stored per token so that `loss_on` can be chosen later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from orchestrator.config.chat_templates import NAMED
from orchestrator.config.schema import DataSpec, ModelSpec
from orchestrator.data.conversation import ChatSettings, Rendered, conversation_template
from orchestrator.data.formats import Malformed
from orchestrator.data.model_tokenizer import ends_of_generation
from orchestrator.data.rows import Conversation, Instruction, Row, Text, Tokens, as_conversation
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

TemplateName = Literal["chat", "alpaca"]


@dataclass(frozen=True)
class Template:
    """How rows are rendered.

    Attributes:
        name: chat renders instruction rows with the tokenizer's chat template, alpaca with Stanford's prompt.
        settings: Settings of the chat template, which conversations always use.
        chosen: `data.chat_template`, for `load_tokenizer`.
    """

    name: TemplateName
    settings: ChatSettings = field(default_factory=ChatSettings)
    chosen: str = "auto"


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
        notes: Names in `orchestrator.data.conversation.NOTES`.
    """

    tokens: npt.NDArray[np.uint32]
    turn: npt.NDArray[np.uint8]
    notes: tuple[str, ...] = ()


def choose(data: DataSpec, model: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return how rows are rendered; `auto` prefers the tokenizer's chat template for instruction rows.

    Args:
        data: `chat_template`, `template_options`, `system_prompt` and `append_eos`.
        model: Its generation_config.json names the tokens that end a turn.
        tokenizer: The tokenizer, with the chosen chat template.

    Raises:
        SpecError: The chosen template is `chat` and the tokenizer has none, or it has no EOS to append.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if data.chat_template == "chat" and not has_chat:
        raise SpecError(
            "data.chat_template=chat, but the tokenizer has no chat template; use chat_template: alpaca, or "
            f"the name of a template: {', '.join(NAMED)}"
        )
    if data.append_eos and not tokenizer.eos_token:
        raise SpecError(
            "data.append_eos=true, but the tokenizer has no EOS token; name one in its tokenizer_config.json"
        )
    settings = ChatSettings(
        tuple(sorted(data.template_options.items())),
        ends_of_generation(model, tokenizer),
        data.system_prompt,
        data.append_eos,
    )
    if has_chat:
        try:
            conversation_template(tokenizer, settings).compile()
        except Malformed:  # it has only templates for other cases, such as tools: told for each row
            pass
        except TemplateError as error:
            raise SpecError(
                f"data.chat_template={data.chat_template}: the chat template cannot be compiled "
                f"({error}); correct it"
            ) from None
    name: TemplateName = "chat" if has_chat and data.chat_template != "alpaca" else "alpaca"
    return Template(name, settings, data.chat_template)


def render(
    row: Conversation | Instruction | Text,
    template: Template | TemplateName,
    tokenizer: PreTrainedTokenizerFast,
    learn_ends: bool = False,
) -> Rendered:
    """Render a row as text and locate its answers.

    Args:
        row: A row that is not tokenized yet.
        template: The result of `choose`, or a template for instruction rows with default settings.
        tokenizer: Provides the chat template and the special tokens.
        learn_ends: Whether the end-of-turn tokens of an empty answer in a conversation count as an answer.

    Raises:
        Malformed: The chat template raised an error or leaves out parts of the row, or the answers cannot be
            located in its output.
    """
    template = Template(template) if isinstance(template, str) else template
    end = tokenizer.eos_token or ""
    if isinstance(row, Text):
        return _joined(row.prompt, row.completion + end)
    if isinstance(row, Instruction) and template.name == "chat":
        row = as_conversation(row)
    if isinstance(row, Conversation):
        return conversation_template(tokenizer, template.settings).render(row, learn_ends)
    if row.history:
        raise Malformed(
            "field history needs several turns, which chat_template: alpaca has not; use chat_template: chat"
        )
    body = _ALPACA_WITH_INPUT if row.input else _ALPACA_WITHOUT_INPUT
    prompt = body.format(instruction=row.instruction, input=row.input)
    system = row.system or template.settings.system_prompt
    prompt = f"{system}\n\n{prompt}" if system else prompt
    return _joined(prompt, row.output + end)


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    template: Template | TemplateName,
    learn_ends: bool = False,
) -> list[Encoded | Malformed]:
    """Tokenize rows without truncation.

    Token ids of conversations equal those of `tokenizer.apply_chat_template(..., tokenize=True)`: the whole
    conversation is tokenized at once, never turn by turn. Those of other rows equal those of
    `tokenizer(text)`, with the end-of-sequence token at the end.

    Args:
        rows: Any number of rows.
        tokenizer: A fast Hugging Face tokenizer.
        template: See `render`.
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
    # offsets[i] is the flat list [start 0, end 0, start 1, end 1, ...] of text i, in characters; `tokenize`
    # returns the same list in tokens.
    texts = [result for result in results if isinstance(result, Rendered)]
    offsets = [[place for span in each.answers for place in span] for each in texts]
    begin = begin_ids(tokenizer) if any(each.is_plain for each in texts) else []
    encoded = iter(tokenize(tokenizer, [each.text for each in texts], offsets))
    return [label(each, *next(encoded), begin) if isinstance(each, Rendered) else each for each in results]


def begin_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, such as BOS."""
    with_special: list[int] = tokenizer("a").input_ids
    text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    for at in range(len(with_special)):
        if with_special[at : at + len(text)] == text:
            return with_special[:at]
    return []


def label(
    rendered: Rendered, tokens: npt.NDArray[np.uint32], borders: Sequence[int], begin: Sequence[int]
) -> Encoded:
    """Label tokens by the answer that contains them.

    An answer starts at the token that contains its first character, so a token that spans the end of the
    prompt and the start of the answer belongs to the answer.

    Args:
        rendered: The text and its answers.
        tokens: Token ids of the text, shape [length].
        borders: Token positions [start 0, end 0, start 1, end 1, ...], one pair per span of an answer.
        begin: Tokens to put before a text that no chat template wrote.
    """
    turn = np.zeros(len(tokens), np.uint8)
    for span, (first, stop) in enumerate(zip(borders[::2], borders[1::2], strict=True)):
        is_last = span >= len(rendered.answers) - rendered.spans_of_last
        turn[first:stop] = LAST_RESPONSE if is_last else RESPONSE
    if rendered.is_plain and begin:
        tokens = np.concatenate([np.array(begin, np.uint32), tokens])
        turn = np.concatenate([np.zeros(len(begin), np.uint8), turn])
    return Encoded(tokens, turn, rendered.notes)


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
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), is_plain=True)
