"""The four kinds of row that every format is read into, and whether one has anything to learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config.schema import DataSpec

Learnt = Literal["answers", "ends", "all"]
"""What can be learnt of a row: answers that have text; these, and the end of empty ones; every token."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, the assistant's among them to be learnt.

    Attributes:
        messages: Dictionaries with role and content, in the OpenAI form.
        tools: JSON schemas of the tools on offer.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction and the response to be learnt, with the text of each."""

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Text:
    """A text, with what comes before it and is not learnt."""

    completion: str
    prompt: str = ""


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere.

    Attributes:
        ids: Token ids.
        trained: Whether each is a target of the loss.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


Row = Conversation | Instruction | Text | Tokens


def learnt_of(data: DataSpec) -> Learnt:
    """Return what a job learns of its rows, which decides which of them have nothing to learn."""
    if data.loss_on == "all":
        return "all"
    return "ends" if data.empty_answers == "learn_end" else "answers"


def is_learnt(message: Mapping[str, Any], learn_ends: bool) -> bool:
    """Tell whether a message of a conversation is an answer to learn.

    Args:
        message: With its role, content, tool_calls and weight.
        learn_ends: Whether the end of an answer without text and tool calls is learnt.
    """
    if message["role"] != "assistant" or not message.get("weight", 1):
        return False
    return learn_ends or has_content(message)


def has_content(message: Mapping[str, Any]) -> bool:
    """Tell whether a message says anything: text that is more than white space, or a call of a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def nothing_to_learn(row: Row, learnt: Learnt) -> str | None:
    """Return why a row has nothing to learn, or None where it has.

    White space alone is no answer. A row without any text has nothing to learn, whatever `learnt` is: the end
    of an empty answer is only learnt after something that is answered so.
    """
    if isinstance(row, Instruction):
        return _lack_of_instruction(row, learnt)
    if isinstance(row, Conversation):
        return _lack_of_conversation(row, learnt)
    if isinstance(row, Text):
        if not (row.prompt + row.completion).strip():
            return "its text is empty"
        return None if row.completion.strip() or learnt != "answers" else "field completion is empty"
    if not row.ids:
        return "it has no tokens"
    # The first token has nothing before it to be predicted from.
    is_any = len(row.ids) > 1 if learnt == "all" else any(row.trained[1:])
    return None if is_any else "none of its tokens is to be learnt"


def empty_answers(row: Row) -> str | None:
    """Return which answers of a row have no text, or None where all have; those of weight 0 do not count."""
    if isinstance(row, Instruction):
        has_text = [bool(answer.strip()) for answer in (*(answer for _, answer in row.history), row.output)]
    elif isinstance(row, Conversation):
        answers = [each for each in row.messages if each["role"] == "assistant"]
        has_text = [is_learnt(each, learn_ends=False) or not each.get("weight", 1) for each in answers]
    else:
        return None
    numbers = [str(number) for number, has in enumerate(has_text, start=1) if not has]
    return f"answer {', '.join(numbers)} of {len(has_text)} is empty" if numbers else None


def _lack_of_instruction(row: Instruction, learnt: Learnt) -> str | None:
    answers = (*(answer for _, answer in row.history), row.output)
    questions = (row.instruction, row.input, *(question for question, _ in row.history))
    if any(answer.strip() for answer in answers):
        return None
    if learnt == "answers" or not any(question.strip() for question in questions):
        return "field output is empty"
    return None


def _lack_of_conversation(row: Conversation, learnt: Learnt) -> str | None:
    if not row.messages:
        return "it has no messages"
    if not any(map(has_content, row.messages)):
        return "its messages are empty"
    if learnt == "all" or any(is_learnt(each, learnt == "ends") for each in row.messages):
        return None
    if any(is_learnt(each, learn_ends=True) for each in row.messages):
        return "the answer is empty"
    return "no message of the assistant is to be learnt"
