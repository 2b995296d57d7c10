"""The row types that every data format is parsed into, and the check for trained tokens in a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from orchestrator.config.schema import DataSpec

Learnt = Literal["answers", "ends", "all"]
"""Which tokens of a row may be trained.

`answers`: answers with text. `ends`: also the end-of-turn or EOS token of empty answers. `all`: every token.
"""


REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of an answer's reasoning, as transformers knows them; the first that has a value counts."""

JsonObject = Mapping[str, Any]
"""A tool or a tool call in OpenAI's format, as chat templates read it."""


class ParsedArguments(dict[str, Any]):
    """Arguments of a tool call, parsed from the JSON text of the row.

    Attributes:
        text: The JSON text as the row has it, for templates that write text (`with_text_arguments`).
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


class Message(TypedDict):
    """A message in OpenAI's format; chat templates may read further fields.

    Attributes:
        role: Such as `user` or `assistant`.
        content: The text.
        tool_calls: Tool calls of an answer.
        tool_call_id: Id of the call that a message of role `tool` answers.
        weight: 0 excludes an answer from the loss.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[JsonObject]]
    tool_call_id: NotRequired[str]
    weight: NotRequired[int]


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template; those of the assistant are the answers.

    Attributes:
        messages: The messages in order.
        tools: JSON schemas of the available tools.
    """

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """An instruction in Alpaca's format with its answer, `output`.

    Attributes:
        instruction: The instruction.
        input: Additional input; empty for none.
        output: The answer.
        system: System prompt; empty for none.
        history: Earlier turns as (question, answer) pairs.
    """

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Text:
    """A text to train on, with an optional prompt that is excluded from the loss."""

    completion: str
    prompt: str = ""


@dataclass(frozen=True)
class Tokens:
    """A row that is already tokenized.

    Attributes:
        ids: Token ids.
        trained: Whether each token is a target of the loss, as long as `ids`.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


Row = Conversation | Instruction | Text | Tokens


def as_conversation(row: Instruction) -> Conversation:
    """Return an instruction row as messages; additional input follows the instruction on its own line."""
    messages: list[Message] = [{"role": "system", "content": row.system}] if row.system else []
    for question, answer in row.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row.output}]
    return Conversation(tuple(messages))


def learnt_of(data: DataSpec) -> Learnt:
    """Return which tokens a job may train, from `data.loss_on` and `data.empty_answers`."""
    if data.loss_on == "all":
        return "all"
    return "ends" if data.empty_answers == "learn_end" else "answers"


def is_learnt(message: Message, learn_ends: bool) -> bool:
    """Return whether a message of a conversation is an answer that contributes to the loss.

    Args:
        message: A message of any role.
        learn_ends: Whether the end-of-turn tokens of an empty answer are trained.
    """
    if message["role"] != "assistant" or not message.get("weight", 1):
        return False
    return learn_ends or has_content(message)


def has_content(message: Message) -> bool:
    """Return whether a message has text other than white space, or tool calls."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def nothing_to_learn(row: Row, learnt: Learnt) -> str | None:
    """Return why a row has no trained tokens, or None if it has some.

    White space does not count as an answer. A row without any text is always reported, whatever `learnt` is:
    the end of an empty answer is trained only if a prompt precedes it.

    Args:
        row: The row to check.
        learnt: Which tokens may be trained.
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
    # The first token is never a target: no earlier token predicts it.
    is_any = len(row.ids) > 1 if learnt == "all" else any(row.trained[1:])
    return None if is_any else "none of its tokens is to be learnt"


def empty_answers(row: Row) -> str | None:
    """Return which answers of a row are empty, or None if none is; answers of weight 0 are ignored."""
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


def with_call_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages in which every tool call and every message of role `tool` has an id.

    Ids of the row are kept. Others are nine letters or digits, as Mistral's templates require, and depend
    only on the messages. A message of role `tool` without an id answers the first call of its `name`, or else
    the first call, that no message answered yet.

    Args:
        messages: Messages of a conversation; they are not changed.
    """
    answered = {message.get("tool_call_id") for message in messages}
    waiting: list[tuple[str, str]] = []  # (id, function name) of calls that no message answers by id
    result: list[Message] = []
    for at, message in enumerate(messages):
        copy = message.copy()
        if calls := message.get("tool_calls"):
            copy["tool_calls"] = [
                {"id": _call_id(call, at, number), **call} for number, call in enumerate(calls)
            ]
            waiting += [
                (call["id"], call["function"]["name"])
                for call in copy["tool_calls"]
                if call["id"] not in answered
            ]
        if message["role"] == "tool" and "tool_call_id" not in message and waiting:
            same_name = [number for number, (_, name) in enumerate(waiting) if name == message.get("name")]
            copy["tool_call_id"] = waiting.pop(same_name[0] if same_name else 0)[0]
        result.append(copy)
    return tuple(result)


def _call_id(call: JsonObject, message: int, number: int) -> str:
    text = json.dumps([message, number, call["function"]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:9]


def with_text_arguments(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages whose tool calls have their arguments as JSON text.

    This is the text of the row if it had text, and otherwise its object, serialized.

    Args:
        messages: Messages of a conversation; they are not changed.
    """
    result: list[Message] = []
    for message in messages:
        copy = message.copy()
        if calls := message.get("tool_calls"):
            copy["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}}
                for call in calls
            ]
        result.append(copy)
    return tuple(result)


def _text(arguments: object) -> str:
    if isinstance(arguments, ParsedArguments):
        return arguments.text
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
