"""Parsing and detection of every data format, and the errors for values that are not rows."""

import json
from typing import Any

import pytest

from orchestrator.data.formats import Malformed, detect, parse
from orchestrator.data.rows import Conversation, Instruction, Text, Tokens

HALF = "\ud83d"
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome"}}}
SCHEMA = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def user(content: Any = "Hi?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "Hi.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def turn(who: Any, value: Any) -> dict[str, Any]:
    return {"from": who, "value": value}


def reason_of(value: Any, wanted: Any = "auto") -> str:
    with pytest.raises(Malformed) as caught:
        parse(value, wanted)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ({"instruction": "a", "output": "b"}, Instruction("a", "", "b")),
        ({"instruction": "a", "input": "i", "output": "b"}, Instruction("a", "i", "b")),
        ({"instruction": "a", "input": "", "output": " b\n"}, Instruction("a", "", " b\n")),
        (
            {"instruction": None, "input": "i", "output": "o", "system": "be kind", "id": 7},
            Instruction("", "i", "o", "be kind"),
        ),
        (
            {"instruction": "a", "input": None, "output": "b", "system": None, "history": None},
            Instruction("a", "", "b"),
        ),
        ({"instruction": "a", "output": "b", "history": []}, Instruction("a", "", "b")),
        (
            {"instruction": "a", "output": "b", "history": [["q", "w"], ["", "é"]]},
            Instruction("a", "", "b", history=(("q", "w"), ("", "é"))),
        ),
        ({"instruction": "a", "output": "b", "text": "an Alpaca row"}, Instruction("a", "", "b")),
        ({"instruction": "😀", "output": "\0"}, Instruction("😀", "", "\0")),
    ],
)
def test_alpaca_rows(value: dict[str, Any], row: Instruction) -> None:
    assert parse(value, "auto") == parse(value, "alpaca") == row
    assert parse(json.dumps(value).encode(), "auto") == row
    assert parse(json.dumps(value, ensure_ascii=False).encode() + b"\r", "auto") == row


@pytest.mark.parametrize(
    ("value", "messages", "tools"),
    [
        ({"messages": [user(), assistant()]}, (user(), assistant()), ()),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    user(),
                    assistant("a"),
                    user("b"),
                    assistant("c"),
                ]
            },
            ({"role": "system", "content": "s"}, user(), assistant("a"), user("b"), assistant("c")),
            (),
        ),
        (  # nulls in table columns count as missing fields
            {
                "messages": [user() | {"tool_calls": None, "name": None}, assistant(weight=None)],
                "tools": None,
            },
            (user(), assistant()),
            (),
        ),
        (
            {"messages": [user(), assistant("a", weight=0), user(), assistant("b", weight=1)]},
            (user(), assistant("a", weight=0), user(), assistant("b", weight=1)),
            (),
        ),
        (
            {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant()]},
            (user("ab"), assistant()),
            (),
        ),
        ({"messages": [user([]), assistant()]}, (user(""), assistant()), ()),
        (
            {"messages": [user(None), {"role": "tool", "tool_call_id": "1"}, assistant()], "tools": []},
            (user(""), {"role": "tool", "tool_call_id": "1", "content": ""}, assistant()),
            (),
        ),
        (
            {"messages": [{"role": "developer", "content": "d"}, assistant(reasoning_content="hm")]},
            ({"role": "developer", "content": "d"}, assistant(reasoning_content="hm", thinking="hm")),
            (),
        ),
        (
            {"messages": [user(), assistant(None, tool_calls=[CALL])], "tools": [TOOL]},
            (user(), assistant("", tool_calls=[CALL])),
            (TOOL,),
        ),
        ({"messages": [assistant(tool_calls=[])], "tools": [SCHEMA]}, (assistant(tool_calls=[]),), (TOOL,)),
        ({"messages": [assistant()], "tools": json.dumps([SCHEMA])}, (assistant(),), (TOOL,)),
        ({"messages": [assistant()], "tools": " "}, (assistant(),), ()),
    ],
)
def test_rows_of_messages(value: dict[str, Any], messages: Any, tools: Any) -> None:
    expected = Conversation(tuple(messages), tuple(tools))
    assert parse(value, "auto") == parse(value, "messages") == expected
    assert parse(json.dumps(value).encode(), "auto") == expected


@pytest.mark.parametrize(
    ("call", "read"),
    [
        (CALL, CALL),
        ({"function": {"name": "look_up", "arguments": '{"city": "Rome"}'}}, CALL),
        ({"name": "look_up", "arguments": {"city": "Rome"}}, CALL),
        ({"id": "7", "type": "function", **CALL}, {"id": "7", **CALL}),
        ({"id": None, **CALL}, CALL),
        (
            {"name": "f", "arguments": "no JSON"},
            {"type": "function", "function": {"name": "f", "arguments": "no JSON"}},
        ),
        ({"name": "f", "arguments": {}}, {"type": "function", "function": {"name": "f", "arguments": {}}}),
        (
            {"name": "f", "arguments": "[" * 100_000},
            {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}},
        ),
    ],
)
def test_tool_calls_have_one_form_whether_arguments_are_text_or_an_object(call: Any, read: Any) -> None:
    row = parse({"messages": [user(), assistant("", tool_calls=[call, CALL])]}, "auto")
    assert isinstance(row, Conversation)
    assert row.messages[1]["tool_calls"] == [read, CALL]


@pytest.mark.parametrize(
    ("value", "messages", "tools"),
    [
        ({"conversations": [turn("human", "Hi?"), turn("gpt", "Hi.")]}, (user(), assistant()), ()),
        (
            {
                "conversations": [
                    turn("user", "a"),
                    turn("assistant", "b"),
                    turn("human", "c"),
                    turn("model", "d"),
                ]
            },
            (user("a"), assistant("b"), user("c"), assistant("d")),
            (),
        ),
        (
            {"system": "s", "conversations": [turn("human", "Hi?"), turn("gpt", "Hi.")], "id": "x"},
            ({"role": "system", "content": "s"}, user(), assistant()),
            (),
        ),
        (
            {"system": "", "conversations": [turn("system", "t"), turn("human", ""), turn("gpt", "Hi.")]},
            ({"role": "system", "content": "t"}, user(""), assistant()),
            (),
        ),
        (
            {
                "conversations": [
                    turn("human", "Hi?"),
                    turn("function_call", '{"name": "look_up", "arguments": {"city": "Rome"}}'),
                    turn("observation", "sunny"),
                    turn("gpt", "Sunny."),
                ],
                "tools": json.dumps([SCHEMA]),
            },
            (
                user(),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "sunny"},
                assistant("Sunny."),
            ),
            (TOOL,),
        ),
        (
            {
                "conversations": [
                    turn("human", "Hi?"),
                    turn("tool_call", json.dumps([CALL["function"], CALL])),
                ]
            },
            (user(), assistant("", tool_calls=[CALL, CALL])),
            (),
        ),
        ({"conversations": [user(), assistant()], "tools": [TOOL]}, (user(), assistant()), (TOOL,)),
        (
            {"conversations": [turn("human", "a") | {"weight": None}, turn("gpt", "b")], "tools": ""},
            (user("a"), assistant("b")),
            (),
        ),
    ],
)
def test_sharegpt_rows(value: dict[str, Any], messages: Any, tools: Any) -> None:
    expected = Conversation(tuple(messages), tuple(tools))
    assert parse(value, "auto") == parse(value, "sharegpt") == expected
    assert parse(json.dumps(value).encode(), "auto") == expected


def test_prompt_and_completion_of_text() -> None:
    assert parse({"prompt": "a ", "completion": "b"}, "auto") == Text("b", "a ")
    assert parse({"prompt": "", "completion": " "}, "prompt_completion") == Text(" ")
    assert parse({"prompt": None, "completion": "b"}, "prompt_completion") == Text("b")


def test_prompt_and_completion_of_messages_learn_the_completion_alone() -> None:
    value = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    before = [{**each, "weight": 0} for each in value["prompt"]]
    assert parse(value, "auto") == Conversation((*before, assistant("d")))
    assert parse({**value, "tools": [SCHEMA]}, "auto") == Conversation((*before, assistant("d")), (TOOL,))


def test_texts() -> None:
    assert parse({"text": " a\n", "meta": {"url": "x"}}, "auto") == Text(" a\n")
    assert parse({"text": "a", "instruction": "b", "output": "c"}, "text") == Text("a")


def test_rows_of_tokens() -> None:
    ids = [5, 6, 2**32 - 1]
    every, last = Tokens(tuple(ids), (True,) * 3), Tokens(tuple(ids), (False, False, True))
    assert parse({"input_ids": ids}, "auto") == every
    assert parse({"input_ids": ids, "labels": None, "completion_mask": None}, "auto") == every
    assert parse({"input_ids": ids, "labels": ids}, "auto") == every
    assert parse({"input_ids": ids, "labels": [-100, -100, ids[2]]}, "auto") == last
    assert parse({"input_ids": ids, "completion_mask": [0, 0, 1]}, "tokens") == last
    assert parse({"input_ids": ids, "completion_mask": [False, False, True]}, "auto") == last
    both = {"input_ids": ids, "labels": ids, "completion_mask": [0, 0, 1], "attention_mask": [1, 1, 1]}
    assert parse(both, "auto") == every  # labels take precedence over completion_mask


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ("instruction output", "alpaca"),
        ("instruction", "alpaca"),
        ("output", "alpaca"),
        ("instruction input output text", "alpaca"),
        ("messages", "messages"),
        ("messages conversations", "messages"),
        ("prompt messages", "messages"),
        ("conversations system", "sharegpt"),
        ("prompt completion", "prompt_completion"),
        ("prompt completion text", "prompt_completion"),
        ("text", "text"),
        ("text prompt", "text"),
        ("input_ids", "tokens"),
        ("input_ids labels text", "tokens"),
    ],
)
def test_a_format_is_told_by_its_fields(fields: str, name: str) -> None:
    assert detect(dict.fromkeys(fields.split(), "x")) == name
    nulls = dict.fromkeys(["input_ids", "messages", "conversations", "prompt", "instruction", "text"])
    assert detect({**nulls, **dict.fromkeys(fields.split(), "x")}) == name


@pytest.mark.parametrize(
    "fields", ["", "prompt", "completion", "question answer", "Text", "system history input", "labels"]
)
def test_fields_of_no_format_are_refused_with_all_formats(fields: str) -> None:
    reason = reason_of(dict.fromkeys(fields.split(), "x"))
    assert reason.startswith(f"the fields {', '.join(fields.split()) or 'nothing'} are of no known format; ")
    for name in ("alpaca", "messages", "sharegpt", "prompt_completion", "text or tokens", "format: "):
        assert name in reason


@pytest.mark.parametrize("wanted", ["auto", "alpaca", "text", "tokens"])
@pytest.mark.parametrize(("value", "kind"), [([1], "list"), ("text", "str"), (None, "NoneType"), (3, "int")])
def test_a_row_that_is_no_object_is_refused(value: Any, kind: str, wanted: Any) -> None:
    assert reason_of(value, wanted) == f"a {kind} where an object with fields belongs"
    assert reason_of(json.dumps(value).encode(), wanted) == f"a {kind} where an object with fields belongs"


@pytest.mark.parametrize(
    "line", ["{", "{'a': 1}", "nonsense", '{"a": ' + "1" * 5000 + "}", '{"a":' * 100_000, '{"a": 1} 2']
)
def test_a_line_that_is_no_json_is_refused(line: str) -> None:
    reason = reason_of(line.encode())
    assert reason.startswith("not valid JSON (")
    assert reason.endswith("); write one JSON object a line")


def test_a_line_that_is_not_utf_8_is_refused() -> None:
    assert reason_of(b'{"text": "caf\xe9"}') == "not UTF-8 text (byte 13); convert it to UTF-8"
