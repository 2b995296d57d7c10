"""Rows without trained tokens, in every format, as opposed to trainable and malformed rows."""

import copy
import json
from typing import Any

import pytest

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.formats import parse
from orchestrator.data.rows import (
    Conversation,
    Learnt,
    Message,
    empty_answers,
    learnt_of,
    nothing_to_learn,
    with_call_ids,
    with_text_arguments,
)
from tests.unit.data.test_formats import CALL, assistant, turn, user

SYSTEM = {"role": "system", "content": "Be kind."}

# Rows whose answers are all empty; only the end of an answer can be trained (`learn_end`).
NO_ANSWER: list[tuple[Any, str]] = [
    ({"instruction": "a", "output": ""}, "field output is empty"),
    ({"instruction": "a", "output": " \n\t"}, "field output is empty"),
    ({"instruction": "a", "output": None}, "field output is empty"),
    ({"instruction": "", "input": "a", "output": ""}, "field output is empty"),
    ({"instruction": "a", "output": "", "history": [["q", " "]]}, "field output is empty"),
    ({"messages": [user(), assistant("")]}, "the answer is empty"),
    ({"messages": [user(), assistant(" \n")]}, "the answer is empty"),
    ({"messages": [user(), assistant(None)]}, "the answer is empty"),
    ({"messages": [user(), assistant([])]}, "the answer is empty"),
    ({"messages": [user(), assistant([{"type": "text", "text": ""}])]}, "the answer is empty"),
    ({"messages": [user(), assistant("", tool_calls=[])]}, "the answer is empty"),
    ({"messages": [user(), assistant("", tool_calls=None)]}, "the answer is empty"),
    ({"messages": [user(), assistant("b", weight=0), user(), assistant("")]}, "the answer is empty"),
    ({"conversations": [turn("human", "a"), turn("gpt", "")]}, "the answer is empty"),
    ({"conversations": [turn("human", "a"), turn("gpt", " ")]}, "the answer is empty"),
    ({"conversations": [turn("human", "a"), turn("gpt", None)]}, "the answer is empty"),
    ({"conversations": [turn("human", "a"), turn("function_call", "")]}, "the answer is empty"),
    ({"conversations": [turn("human", "a"), turn("function_call", "[]")]}, "the answer is empty"),
    ({"conversations": [user(), assistant("")]}, "the answer is empty"),
    ({"prompt": "a", "completion": ""}, "field completion is empty"),
    ({"prompt": "a", "completion": " \n"}, "field completion is empty"),
    ({"prompt": "a", "completion": None}, "field completion is empty"),
    ({"prompt": [user()], "completion": [assistant("")]}, "the answer is empty"),
    ({"prompt": [assistant("b"), user()], "completion": [assistant(None)]}, "the answer is empty"),
]  # fmt: skip
# Rows with tokens, but without an answer whose end could be trained.
NOT_ASKED: list[tuple[Any, str]] = [
    ({"messages": [user()]}, "no message of the assistant is to be learnt"),
    ({"messages": [user(), assistant("b", weight=0)]}, "no message of the assistant is to be learnt"),
    ({"messages": [user(), assistant("", weight=0)]}, "no message of the assistant is to be learnt"),
    ({"conversations": [turn("human", "a")]}, "no message of the assistant is to be learnt"),
    ({"system": "s", "conversations": []}, "no message of the assistant is to be learnt"),
    ({"prompt": [user()], "completion": []}, "no message of the assistant is to be learnt"),
    ({"prompt": [user()], "completion": None}, "no message of the assistant is to be learnt"),
    ({"prompt": [assistant("b")], "completion": [user()]}, "no message of the assistant is to be learnt"),
    ({"input_ids": [5, 6], "labels": [-100, -100]}, "none of its tokens is to be learnt"),
    # The first token is never a target, even with a label.
    ({"input_ids": [5, 6], "labels": [5, -100]}, "none of its tokens is to be learnt"),
    ({"input_ids": [5, 6], "completion_mask": [0, 0]}, "none of its tokens is to be learnt"),
]
# Rows without any text.
NOTHING: list[tuple[Any, str]] = [
    ({"instruction": "", "input": " ", "output": ""}, "field output is empty"),
    ({"instruction": None, "output": None}, "field output is empty"),
    ({"messages": []}, "it has no messages"),
    ({"messages": None}, "it has no messages"),
    ({"messages": [user(""), assistant("")]}, "its messages are empty"),
    ({"messages": [assistant(" ")]}, "its messages are empty"),
    ({"conversations": []}, "it has no messages"),
    ({"conversations": [turn("gpt", "")]}, "its messages are empty"),
    ({"prompt": "", "completion": " "}, "its text is empty"),
    ({"prompt": [], "completion": []}, "it has no messages"),
    ({"text": ""}, "its text is empty"),
    ({"text": " \n"}, "its text is empty"),
    ({"text": None}, "its text is empty"),
    ({"text": None, "messages": None}, "it has no messages"),
    ({"input_ids": []}, "it has no tokens"),
    ({"input_ids": None, "labels": None}, "it has no tokens"),
    ({"input_ids": [5]}, "none of its tokens is to be learnt"),
]
SOMETHING: list[Any] = [
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "output": "", "history": [["q", "w"]]},
    {"messages": [user(), assistant("")] * 2 + [user(), assistant("b")]},
    {"messages": [user(), assistant("b"), user(), assistant(None)]},
    {"messages": [user(), assistant(None, tool_calls=[CALL])]},
    {"messages": [user(), assistant("", tool_calls=[CALL])]},
    {"conversations": [turn("human", "a"), turn("gpt", ""), turn("human", "b"), turn("gpt", "c")]},
    {"prompt": "", "completion": "b"},
    {"prompt": None, "completion": "b"},
    {"prompt": None, "completion": [assistant("b")]},
    {"text": "a"},
    {"input_ids": [5, 6]},
    {"input_ids": [5, 6], "labels": [-100, 6]},
]


def lack(value: Any, learnt: Learnt) -> str | None:
    return nothing_to_learn(parse(value, "auto"), learnt)


@pytest.mark.parametrize(("value", "reason"), NO_ANSWER)
def test_a_row_without_an_answer_has_its_end_to_learn(value: Any, reason: str) -> None:
    assert [lack(value, learnt) for learnt in ("answers", "ends", "all")] == [reason, None, None]


@pytest.mark.parametrize(("value", "reason"), NOT_ASKED)
def test_a_row_of_which_no_answer_is_asked_has_only_its_tokens(value: Any, reason: str) -> None:
    assert [lack(value, learnt) for learnt in ("answers", "ends", "all")] == [reason, reason, None]


@pytest.mark.parametrize(("value", "reason"), NOTHING)
def test_a_row_without_text_has_nothing_to_learn_whatever_is_learnt(value: Any, reason: str) -> None:
    assert [lack(value, learnt) for learnt in ("answers", "ends", "all")] == [reason] * 3


@pytest.mark.parametrize("value", SOMETHING)
def test_a_row_with_one_answer_has_something_to_learn(value: Any) -> None:
    assert [lack(value, learnt) for learnt in ("answers", "ends", "all")] == [None] * 3


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"messages": [user(), assistant("a"), user(), assistant("")]}, "answer 2 of 2 is empty"),
        (
            {"messages": [SYSTEM, user(), assistant(" "), user(), assistant("b"), user(), assistant("")]},
            "answer 1, 3 of 3 is empty",
        ),
        ({"messages": [user(), assistant("", weight=0), user(), assistant("b")]}, None),
        ({"messages": [user(), assistant("", tool_calls=[CALL]), user(), assistant("b")]}, None),
        ({"conversations": [turn("gpt", ""), user("b"), turn("gpt", "c")][::2]}, "answer 1 of 2 is empty"),
        ({"instruction": "a", "output": "b", "history": [["q", ""]]}, "answer 1 of 2 is empty"),
        ({"instruction": "a", "output": "", "history": [["q", "w"]]}, "answer 2 of 2 is empty"),
        ({"instruction": "a", "output": "b"}, None),
        ({"text": "a"}, None),
        ({"input_ids": [5, 6], "labels": [-100, 6]}, None),
    ],
)  # fmt: skip
def test_empty_answers_among_others_are_numbered(value: Any, found: str | None) -> None:
    assert empty_answers(parse(value, "auto")) == found


@pytest.mark.parametrize(
    ("settings", "learnt"),
    [
        ({}, "answers"),
        ({"empty_answers": "error"}, "answers"),
        ({"loss_on": "last_turn"}, "answers"),
        ({"empty_answers": "learn_end"}, "ends"),
        ({"loss_on": "all"}, "all"),
        ({"loss_on": "all", "empty_answers": "learn_end"}, "all"),
    ],
)
def test_a_job_says_what_is_learnt(settings: dict[str, Any], learnt: Learnt) -> None:
    assert learnt_of(DataSpec(train=(SourceSpec(path="d"),), **settings)) == learnt


def called(*names: str, **more: Any) -> dict[str, Any]:
    return assistant(
        "", tool_calls=[{"function": {"name": name, "arguments": "{}"}, **more} for name in names]
    )


def answer(content: str = "9", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def messages_of(*messages: dict[str, Any]) -> tuple[Message, ...]:
    row = parse({"messages": [user(), *messages]}, "auto")
    assert isinstance(row, Conversation)
    return row.messages


def test_made_up_call_ids_suit_every_template_and_join_answers_to_calls() -> None:
    messages = messages_of(called("a", "b"), answer(), answer(), assistant("So."), called("a"), answer())
    before = json.dumps(messages)
    with_ids = with_call_ids(messages)
    calls = [call["id"] for message in with_ids for call in message.get("tool_calls", ())]
    assert len(set(calls)) == 3
    assert all(len(each) == 9 and each.isalnum() and each.isascii() for each in calls)
    assert [message["tool_call_id"] for message in with_ids if message["role"] == "tool"] == calls
    assert json.dumps(messages) == before
    assert with_call_ids(messages) == with_ids == with_call_ids(with_ids)


@pytest.mark.parametrize(
    ("messages", "answered"),
    [
        ([called("a", "b"), answer(name="b"), answer(name="a")], [1, 0]),
        ([called("a", "b"), answer(name="c"), answer()], [0, 1]),
        ([called("a", id="x"), called("b"), answer(tool_call_id="x"), answer()], [0, 1]),
        ([called("a", id="x"), answer()], [0]),
        ([called("a"), answer(tool_call_id="y")], ["y"]),
        ([answer()], [None]),
    ],
)
def test_ids_of_the_row_are_kept(messages: list[dict[str, Any]], answered: list[Any]) -> None:
    with_ids = with_call_ids(messages_of(*messages))
    calls = [call["id"] for message in with_ids for call in message.get("tool_calls", ())]
    assert "x" in calls or not any(call.get("id") for each in messages for call in each.get("tool_calls", ()))
    found = [message.get("tool_call_id") for message in with_ids if message["role"] == "tool"]
    assert found == [calls[each] if isinstance(each, int) else each for each in answered]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"b":  "é", "a": 1.50}', '{"b":  "é", "a": 1.50}'),
        ({"b": "é", "a": 1.5}, '{"b": "é", "a": 1.5}'),
        ("no JSON", "no JSON"),
        ("[1]", "[1]"),
        ({}, "{}"),
    ],
)
def test_arguments_as_text_are_those_of_the_row(arguments: Any, text: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}}
    messages = messages_of(assistant("", tool_calls=[call]))
    before = copy.deepcopy(messages)
    (given,) = with_text_arguments(messages)[1]["tool_calls"]
    assert given == {**call, "function": {"name": "a", "arguments": text}}
    assert messages == before
