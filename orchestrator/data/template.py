"""Turning a row into prompt and response text, and those into tokens with a mask of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from orchestrator.data.source import Row
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

Template = Literal["chat", "alpaca"]
LossOn = Literal["response", "all"]
Truncation = Literal["right", "left", "drop"]


@dataclass(frozen=True)
class Document:
    """One tokenised row.

    Attributes:
        tokens: Token ids, uint32, shape [length].
        trained: Whether the token is a target of the loss, bool, shape [length]. The first token never is.
    """

    tokens: npt.NDArray[np.uint32]
    trained: npt.NDArray[np.bool_]


def choose(wanted: Literal["auto", "chat", "alpaca"], tokenizer: Any) -> Template:
    """Return the template that is used.

    Raises:
        SpecError: A chat template is asked for and the tokenizer has none.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "chat" and not has_chat:
        raise SpecError(
            "data.template=chat, and the model's tokenizer has no chat template; use template: alpaca"
        )
    if wanted == "auto":
        return "chat" if has_chat else "alpaca"
    return wanted


def texts(row: Row, template: Template, tokenizer: Any) -> tuple[str, str]:
    """Return a row's prompt and response text, special tokens included.

    Raises:
        SpecError: The chat template refuses the row, or writes the prompt differently before an answer.
    """
    if template == "alpaca":
        body = _ALPACA_WITH_INPUT if row.input else _ALPACA_WITHOUT_INPUT
        prompt = body.format(instruction=row.instruction, input=row.input)
        prompt = f"{row.system}\n\n{prompt}" if row.system else prompt
        return (tokenizer.bos_token or "") + prompt, row.output + (tokenizer.eos_token or "")
    question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    messages = [{"role": "system", "content": row.system}] if row.system else []
    messages.append({"role": "user", "content": question})
    answer = {"role": "assistant", "content": row.output}
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    except TemplateError as error:
        raise SpecError(
            f"the model's chat template refuses a row ({error}); use data.template: alpaca, or change the row"
        ) from None
    if not whole.startswith(prompt):
        raise SpecError(
            "the model's chat template writes the prompt differently before an answer, so the response "
            "cannot be told apart; use data.template: alpaca"
        )
    return prompt, whole[len(prompt) :]


def tokenize(rows: Sequence[Row], tokenizer: Any, template: Template, loss_on: LossOn) -> list[Document]:
    """Tokenise rows; prompt and response apart, as they will stand when the model is used.

    Args:
        rows: Any number of rows.
        tokenizer: A fast Hugging Face tokenizer.
        template: As `choose` returned it.
        loss_on: Whether the prompt is trained as well.

    Returns:
        One document a row, in order, not truncated.
    """
    parts = [texts(row, template, tokenizer) for row in rows]
    flat = [text for pair in parts for text in pair]
    encoded = tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    documents = []
    for prompt, response in zip(encoded[::2], encoded[1::2], strict=True):
        tokens = np.array(prompt + response, dtype=np.uint32)
        trained = np.ones(len(tokens), dtype=np.bool_)
        if loss_on == "response":
            trained[: len(prompt)] = False
        trained[:1] = False
        documents.append(Document(tokens, trained))
    return documents


def truncate(document: Document, max_length: int, how: Truncation) -> Document | None:
    """Cut a document to max_length tokens.

    Returns:
        The document, its start (`right` cuts the end off), its end (`left`), or None where it is left out:
        under `drop`, or because no trained token would remain.
    """
    length = len(document.tokens)
    if length > max_length:
        if how == "drop":
            return None
        kept = slice(0, max_length) if how == "right" else slice(length - max_length, length)
        trained = document.trained[kept].copy()
        trained[:1] = False
        document = Document(document.tokens[kept], trained)
    return document if document.trained.any() else None
