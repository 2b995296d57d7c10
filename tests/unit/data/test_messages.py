"""Messages under the names of other trainers and services mean what they mean there."""

from typing import Any

import pytest

from orchestrator.data.formats import parse, read
from orchestrator.data.rows import Conversation, Instruction, Message
from tests.unit.data.test_formats import CALL, SCHEMA, TOOL, assistant, reason_of, turn, user


def messages_of(value: dict[str, Any]) -> tuple[Message, ...]:
    row = parse(value, "auto")
    assert isinstance(row, Conversation)
    return row.messages


@pytest.mark.parametrize(
    ("asker", "answerer"),
    [
        ("human", "gpt"), ("user", "chatgpt"), ("Human", "Assistant"), ("prompter", "bot"), ("user", "bing"),
        ("human", "bard"), (" user", "model"), ("USER", "AI"), ("human", "chatbot"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("role", "text"),
    [("from", "value"), ("role", "content"), ("role", "value"), ("from", "content"), ("user", "text")],
)
def test_roles_and_fields_of_turns(asker: str, answerer: str, role: str, text: str) -> None:
    turns = [{role: asker, text: "Hi?"}, {role: answerer, text: "Hi."}]
    assert messages_of({"conversations": turns}) == (user(), assistant())
    assert messages_of({"messages": turns}) == (user(), assistant())


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "function_response"])
def test_roles_of_tool_answers(role: str) -> None:
    answer = {"role": role, "content": "9", "name": "look_up"}
    assert messages_of({"messages": [user(), answer, assistant()]})[1] == {**answer, "role": "tool"}


def test_turns_of_different_spelling_in_one_row() -> None:
    assert messages_of({"conversations": [turn("human", "Hi?"), assistant()]}) == (user(), assistant())


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "ab"}],
        [{"type": "text", "value": "a"}, {"type": "text", "content": "b"}],
        [{"type": "output_text", "text": "a", "annotations": []}, {"text": "b"}],
        [{"type": "input_text", "text": "a", "image_url": None}, "b"],
    ],
)
@pytest.mark.parametrize("who", ["role", "from"])
def test_parts_of_text(parts: list[Any], who: str) -> None:
    if who == "role":
        assert messages_of({"messages": [user(parts), assistant(parts)]}) == (user("ab"), assistant("ab"))
    else:
        row = {"conversations": [turn("human", parts), turn("gpt", parts)]}
        assert messages_of(row) == (user("ab"), assistant("ab"))


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_image", "video", "audio", "input_audio", "file", "tool_use"]
)
def test_parts_that_are_not_text_are_refused_by_name(kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: "x"}]
    assert reason_of({"messages": [user(parts), assistant()]}).startswith(
        f"messages[0].content[1] is a part of type {kind}, and only text is trained on; "
    )


@pytest.mark.parametrize("field", ["image", "images", "video", "videos", "audio", "audios"])
def test_images_and_the_like_are_refused_by_name(field: str) -> None:
    row = {"messages": [user("<image>What?"), assistant()]}
    for value in (["plum.jpg"], "plum.jpg", {"bytes": "", "path": "plum.jpg"}):
        assert reason_of({**row, field: value}).startswith(f"the row has the field {field}, and only text")
        assert reason_of({"instruction": "a", "output": "b", field: value}).startswith("the row has the ")
        marked = {"messages": [user() | {field: value}, assistant()]}
        assert reason_of(marked).startswith(f"messages[0] has the field {field}, and only text")
    for nothing in (None, [], "", {}):
        assert messages_of({**row, field: nothing}) == (user("<image>What?"), assistant())


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_names_that_templates_read(name: str) -> None:
    (_, answer) = messages_of({"messages": [user(), assistant(**{name: "hm"})]})
    assert answer == {**assistant(reasoning_content="hm", thinking="hm"), name: "hm"}
    (_, answer) = messages_of({"conversations": [turn("human", "a"), turn("gpt", "b") | {name: "hm"}]})
    assert (answer["content"], answer.get("reasoning_content")) == ("b", "hm")


def test_reasoning_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]
    (_, answer) = messages_of({"messages": [user(), assistant(parts)]})
    assert answer == assistant("b", reasoning_content="hm", thinking="hm")


def test_different_reasoning_of_one_answer_is_refused() -> None:
    same = assistant(reasoning="hm", reasoning_content="hm")
    assert messages_of({"messages": [user(), same]})[1]["content"] == "Hi."
    assert reason_of({"messages": [user(), assistant(reasoning="hm", thinking="so")]}) == (
        "messages[1] has different reasoning in thinking, reasoning; keep one of them"
    )


@pytest.mark.parametrize("content", ["I look.", "", None])
def test_an_earlier_function_call_is_a_tool_call(content: Any) -> None:
    call = {"name": "look_up", "arguments": '{"city": "Rome"}'}
    answer = {"role": "function", "name": "look_up", "content": "9"}
    value = {"messages": [user(), assistant(content, function_call=call), answer], "functions": [SCHEMA]}
    row = parse(value, "auto")
    assert row == Conversation(
        (user(), assistant(content or "", tool_calls=[CALL]), {**answer, "role": "tool"}), (TOOL,)
    )
    assert not read(value, "auto").use.without_effect
    without_content = {name: each for name, each in value["messages"][1].items() if name != "content"}
    assert messages_of({"messages": [user(), without_content]})[1]["tool_calls"] == [CALL]


def test_calls_and_tools_that_contradict_are_refused() -> None:
    both = assistant(tool_calls=[CALL], function_call=CALL["function"])
    assert reason_of({"messages": [user(), both]}).startswith("messages[1] has both tool_calls and function_")
    tools = {"tools": [TOOL], "functions": [{"name": "other"}]}
    assert reason_of({"messages": [user(), assistant()], **tools}).startswith("fields tools and functions di")
    row = parse({"messages": [user(), assistant()], "tools": [TOOL], "functions": [SCHEMA]}, "auto")
    assert isinstance(row, Conversation)
    assert row.tools == (TOOL,)


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        '[{"name": "look_up", "arguments": {"city": "Rome"}}]',
        [{"name": "look_up", "parameters": {"city": "Rome"}}],
    ],
)
def test_spellings_of_tool_calls(calls: Any) -> None:
    assert messages_of({"messages": [user(), assistant("", tool_calls=calls)]})[1]["tool_calls"] == [CALL]


def test_tools_as_a_list_of_json_texts() -> None:
    row = parse({"messages": [user(), assistant()], "tools": ['{"name": "f"}']}, "auto")
    assert isinstance(row, Conversation)
    assert row.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_messages_is_the_system_message(name: str) -> None:
    system = {"role": "system", "content": "Be kind."}
    for row in (
        {"messages": [user(), assistant()]},
        {"conversations": [turn("human", "Hi?"), turn("gpt", "Hi.")]},
        {"messages": [system, user(), assistant()]},
    ):
        assert messages_of({**row, name: "Be kind."}) == (system, user(), assistant())
    contradiction = {"messages": [system, user(), assistant()], name: "Be brief."}
    assert reason_of(contradiction).startswith("field system differs from the system message")
    assert parse({"instruction": "a", "output": "b", name: "s"}, "auto") == Instruction("a", "", "b", "s")
    chat = {"prompt": [user()], "completion": [assistant()], name: "Be kind."}
    assert messages_of(chat)[0] == system
    assert reason_of({"prompt": "a", "completion": "b", name: "s"}).startswith(f"field {name} has no place")
    assert reason_of({"messages": [user()], "system": "a", "system_prompt": "b"}).startswith("fields system")


def test_an_instruction_with_tools_is_a_conversation() -> None:
    row = parse({"instruction": "a", "input": "i", "output": "b", "tools": [SCHEMA]}, "auto")
    assert row == Conversation((user("a\ni"), assistant("b")), (TOOL,))
