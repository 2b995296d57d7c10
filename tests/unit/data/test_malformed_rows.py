"""Malformed rows: each gives an error that names the field and the fix."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.formats import Malformed, parse
from orchestrator.data.rows import Conversation, Instruction, Text, Tokens
from tests.unit.data.test_formats import CALL, HALF, assistant, reason_of, turn, user

# (format, malformed row, reason, fix)
BROKEN: list[tuple[str, Any, str, str]] = [
    ("alpaca", {}, "field instruction is missing (found: nothing)", "add it"),
    (
        "auto",
        {"instruction": "a", "response": "b"},
        "field output is missing (found: instruction, resp",
        "add",
    ),
    ("auto", {"output": "b"}, "field instruction is missing (found: output)", "add it"),
    ("auto", {"instruction": 1, "output": "b"}, "field instruction is a int, and it must be text", "quotes"),
    ("auto", {"instruction": "a", "input": 0, "output": "b"}, "field input is a int", "quotes"),
    ("auto", {"instruction": "a", "output": ["b"]}, "field output is a list", "quotes"),
    ("auto", {"instruction": "a", "output": "b", "system": {}}, "field system is a dict", "quotes"),
    ("auto", {"instruction": " ", "input": "", "output": "b"}, "fields instruction and input are", "fill or"),
    (
        "auto",
        {"instruction": "a", "output": "b", "history": ["q"]},
        "field history must be a list",
        "correct",
    ),
    ("auto", {"instruction": "a", "output": "b", "history": [["q"]]}, "field history must be", "correct"),
    ("auto", {"instruction": "a", "output": "b", "history": [["q", 1]]}, "field history must be", "correct"),
    ("auto", {"instruction": "a", "output": "b", "history": 5}, "field history is a int", "must be a list"),
    ("auto", {"instruction": "a", "output": "b", "history": "q"}, "field history is a str", "must be a list"),
    ("messages", {"text": "a"}, "field messages is missing (found: text)", "add it"),
    ("auto", {"messages": "a"}, "field messages is a str", "must be a list"),
    ("auto", {"messages": ["a"]}, "messages[0] is a str", "an object with role and content belongs"),
    ("auto", {"messages": [user(), None]}, "messages[1] is a NoneType", "an object with role and content"),
    (
        "auto",
        {"messages": [{"content": "a"}]},
        "field messages[0].role is missing (found: content)",
        "add it",
    ),
    ("auto", {"messages": [{"role": "robot"}]}, "messages[0].role='robot' is unknown", "use one of system, "),
    ("auto", {"messages": [{"role": None}]}, "messages[0].role=None is unknown", "use one of system, "),
    ("auto", {"messages": [{"role": ["user"]}]}, "messages[0].role=['user'] is unknown", "use one of"),
    ("auto", {"messages": [user(3), assistant()]}, "field messages[0].content is a int", "quotes"),
    ("auto", {"messages": [user({}), assistant()]}, "field messages[0].content is a dict", "quotes"),
    (
        "auto",
        {"messages": [user([{"type": "image", "url": "x"}]), assistant()]},
        "messages[0].content[0] is a part of type image, and only text is trained on",
        "remove it",
    ),
    ("auto", {"messages": [user([3]), assistant()]}, "messages[0].content[0] is a int", "part with type and"),
    (
        "auto",
        {"messages": [user([{"type": "text", "text": None}]), assistant()]},
        "messages[0].content[0] is a part without text (found: type)",
        "add it",
    ),
    (
        "auto",
        {"messages": [user(["a", {"type": "text", "content_": "b"}])]},
        "messages[0].content[1] is a part without text (found: type, content_)",
        "add it",
    ),
    ("auto", {"messages": [user([{"text": 3}])]}, "field messages[0].content is a int", "quotes"),
    ("auto", {"messages": [assistant(weight=2)]}, "messages[0].weight=2", "must be 0 (not learnt) or 1"),
    ("auto", {"messages": [assistant(weight="1")]}, "messages[0].weight='1'", "must be 0 (not learnt) or 1"),
    ("auto", {"messages": [assistant(tool_calls=5)]}, "messages[0].tool_calls is a int", "must be a list"),
    (
        "auto",
        {"messages": [assistant(tool_calls=CALL)]},
        "messages[0].tool_calls is a dict",
        "must be a list",
    ),
    (
        "auto",
        {"messages": [assistant(tool_calls=["f"])]},
        "messages[0].tool_calls holds a function",
        "correct",
    ),
    (
        "auto",
        {"messages": [assistant(tool_calls=[{"name": "f"}])]},
        "messages[0].tool_calls holds a function call without name and arguments",
        "correct it",
    ),
    (
        "auto",
        {"messages": [assistant(tool_calls=[{"function": {"name": 1, "arguments": {}}}])]},
        "messages[0].tool_calls holds a function call without name and arguments",
        "correct it",
    ),
    ("auto", {"messages": [assistant()], "tools": "{"}, "field tools is not valid JSON (", "correct it"),
    (
        "auto",
        {"messages": [assistant()], "tools": "[" * 100_000},
        "field tools is not valid JSON (",
        "correct",
    ),
    ("auto", {"messages": [assistant()], "tools": {}}, "field tools must be a list of objects", "correct it"),
    (
        "auto",
        {"messages": [assistant()], "tools": '["f"]'},
        "field tools must be a list of objects",
        "correct",
    ),
    ("sharegpt", {"messages": []}, "field conversations is missing (found: messages)", "add it"),
    ("auto", {"conversations": {}}, "field conversations is a dict", "must be a list"),
    ("auto", {"conversations": ["a"]}, "conversations[0] is a str", "object with from and value belongs"),
    ("auto", {"conversations": [{"from": "gpt"}]}, "field conversations[0].value is missing", "add it"),
    ("auto", {"conversations": [{"value": "a"}]}, "field conversations[0].from is missing", "add it"),
    (
        "auto",
        {"conversations": [turn("human", "a"), {"content": "b"}]},
        "field conversations[1].from is missing (found: content)",
        "add it",
    ),
    (
        "auto",
        {"conversations": [turn("robot", "a")]},
        "conversations[0].from='robot' is unknown",
        "use one of sys",
    ),
    ("auto", {"conversations": [turn(None, "a")]}, "conversations[0].from=None is unknown", "use one of"),
    (
        "auto",
        {"conversations": [turn("function_call", "f()")]},
        "conversations[0] is a function call and no valid JSON (",
        "correct it",
    ),
    (
        "auto",
        {"conversations": [turn("function_call", "[" * 100_000)]},
        "conversations[0] is a function call and no valid JSON (",
        "correct it",
    ),
    (
        "auto",
        {"conversations": [turn("function_call", '{"name": "f"}')]},
        "conversations[0] holds a function call without name and arguments",
        "correct it",
    ),
    ("auto", {"conversations": [turn("gpt", "a")], "tools": 3}, "field tools must be a list", "correct it"),
    ("auto", {"conversations": [turn("gpt", "a")], "system": 3}, "field system is a int", "quotes"),
    ("prompt_completion", {"prompt": "a"}, "field completion is missing (found: prompt)", "add it"),
    ("prompt_completion", {"completion": "a"}, "field prompt is missing (found: completion)", "add it"),
    ("auto", {"prompt": 1, "completion": "a"}, "field prompt is a int", "quotes"),
    ("auto", {"prompt": "a", "completion": [assistant()]}, "field completion is a list", "quotes"),
    ("auto", {"prompt": [user()], "completion": "a"}, "field prompt is a list", "quotes"),
    ("auto", {"prompt": [3], "completion": [assistant()]}, "prompt[0] is a int", "role and content belongs"),
    ("text", {"content": "a"}, "field text is missing (found: content)", "add it"),
    ("auto", {"text": ["a"]}, "field text is a list", "quotes"),
    ("tokens", {"text": "a"}, "field input_ids is missing (found: text)", "add it"),
    ("auto", {"input_ids": "1 2"}, "field input_ids is a str", "must be a list"),
    ("auto", {"input_ids": [1, -1]}, "field input_ids must be a list of token numbers", "correct it"),
    ("auto", {"input_ids": [1, 2**32]}, "field input_ids must be a list of token numbers", "correct it"),
    ("auto", {"input_ids": [1, 2.0]}, "field input_ids must be a list of token numbers", "correct it"),
    ("auto", {"input_ids": [1, True]}, "field input_ids must be a list of token numbers", "correct it"),
    ("auto", {"input_ids": [[1, 2]]}, "field input_ids must be a list of token numbers", "correct it"),
    ("auto", {"input_ids": [1], "labels": 1}, "field labels is a int", "must be a list"),
    ("auto", {"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries and input_ids 2", "must be as many"),
    (
        "auto",
        {"input_ids": [1, 2], "labels": [2, -100]},
        "labels[0]=2 is neither -100 nor",
        "give labels unshi",
    ),
    (
        "auto",
        {"input_ids": [1, 2], "labels": [1, None]},
        "labels[1]=None is neither -100",
        "give labels unshi",
    ),
    ("auto", {"input_ids": [1, 2], "completion_mask": [1]}, "completion_mask must hold 0 or 1", "correct it"),
    ("auto", {"input_ids": [1], "completion_mask": [2]}, "completion_mask must hold 0 or 1", "correct it"),
    ("auto", {"input_ids": [1], "completion_mask": 1}, "completion_mask must hold 0 or 1", "correct it"),
    ("auto", {"input_ids": [1], "completion_mask": [[1]]}, "completion_mask must hold 0 or 1", "correct it"),
    (
        "auto",
        {"messages": [user(), {"role": "assistant"}]},
        "field messages[1].content is missing (found: role)",
        "add it",
    ),
    ("auto", {"conversations": [turn("gpt", 5)]}, "field conversations[0].value is a int", "quotes"),
    ("auto", {"instruction": "a", "output": 0}, "field output is a int", "quotes"),
    ("auto", {"instruction": "a", "output": "", "history": 5}, "field history is a int", "must be a list"),
    ("auto", {"input_ids": [], "labels": [1]}, "labels has 1 entries and input_ids 0", "must be as many"),
    ("auto", {"prompt": [3], "completion": None}, "prompt[0] is a int", "role and content belongs"),
]


@pytest.mark.parametrize(("wanted", "value", "field", "remedy"), BROKEN)
def test_a_malformed_row_names_its_field_and_a_remedy(
    wanted: Any, value: dict[str, Any], field: str, remedy: str
) -> None:
    reason = reason_of(value, wanted)
    assert reason.startswith(field)
    assert remedy in reason[len(field) :]
    assert reason_of(json.dumps(value).encode(), wanted) == reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instruction", {"instruction": HALF, "output": "b"}),
        ("input", {"instruction": "a", "input": HALF, "output": "b"}),
        ("output", {"instruction": "a", "output": HALF}),
        ("system", {"instruction": "a", "output": "b", "system": HALF}),
        ("history", {"instruction": "a", "output": "b", "history": [["q", HALF]]}),
        ("history", {"instruction": "a", "output": "b", "history": [[HALF, "w"]]}),
        ("messages[0].content", {"messages": [user(HALF), assistant()]}),
        ("messages[0].content", {"messages": [user([{"type": "text", "text": HALF}]), assistant()]}),
        ("messages[0].reasoning_content", {"messages": [assistant(reasoning_content=HALF)]}),
        ("messages[0].name", {"messages": [user() | {"name": HALF}, assistant()]}),
        ("messages[0].tool_calls", {"messages": [assistant(tool_calls=[{"name": HALF, "arguments": {}}])]}),
        (
            "messages[0].tool_calls",
            {"messages": [assistant(tool_calls=[{"name": "f", "arguments": {"a": [HALF]}}])]},
        ),
        (
            "messages[0].tool_calls",
            {"messages": [assistant(tool_calls=[{"name": "f", "arguments": json.dumps({HALF: 1})}])]},
        ),
        ("tools", {"messages": [assistant()], "tools": [{"name": HALF}]}),
        ("tools", {"messages": [assistant()], "tools": json.dumps([{"name": HALF}])}),
        ("conversations[0].value", {"conversations": [turn("gpt", HALF)]}),
        ("conversations[0].content", {"conversations": [assistant(HALF)]}),
        (
            "conversations[0].value",
            {"conversations": [turn("function_call", json.dumps({"name": "f", "arguments": {"a": HALF}}))]},
        ),
        ("system", {"conversations": [turn("gpt", "a")], "system": HALF}),
        ("tools", {"conversations": [turn("gpt", "a")], "tools": json.dumps([{"name": HALF}])}),
        ("prompt", {"prompt": HALF, "completion": "a"}),
        ("completion", {"prompt": "a", "completion": HALF}),
        ("prompt[0].content", {"prompt": [user(HALF)], "completion": [assistant()]}),
        ("completion[0].content", {"prompt": [user()], "completion": [assistant(HALF)]}),
        ("text", {"text": "a" + HALF}),
    ],
)
def test_half_a_surrogate_pair_is_refused_in_every_format(field: str, value: dict[str, Any]) -> None:
    sentence = f"field {field} holds half of a surrogate pair, which is not a character; repair the escape"
    assert reason_of(value) == sentence
    assert reason_of(json.dumps(value).encode()) == sentence
    assert reason_of(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == sentence
    parse(json.dumps(value).replace("ud83d", "u00e9").encode(), "auto")  # a valid character is accepted


def test_a_reason_can_be_printed_though_a_name_holds_half_a_pair() -> None:
    for wanted in ("auto", "text"):
        reason_of({HALF: 1}, wanted).encode()
    reason_of({"messages": [{"role": HALF}]}).encode()
    reason_of({"conversations": [turn(HALF, "a")]}).encode()


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-200, 10)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["user", "assistant", "human", "gpt", "function_call", "text", HALF, "[]", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "tool_calls",
                    "weight",
                    "function",
                    "name",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
)
FIELDS = [
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "messages",
    "tools",
    "conversations",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "completion_mask",
]


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=5),
    st.sampled_from(["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens"]),
)
def test_any_row_is_read_or_refused_in_a_sentence_and_never_breaks_the_reader(
    value: dict[str, Any], wanted: Any
) -> None:
    try:
        row = parse(value, wanted)
    except Malformed as error:
        str(error).encode()
        return
    assert isinstance(row, Conversation | Instruction | Text | Tokens)
    json.dumps([getattr(row, name) for name in row.__dataclass_fields__], ensure_ascii=False).encode()
