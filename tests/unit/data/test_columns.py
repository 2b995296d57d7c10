"""Names of fields: `columns` of a source, names in common use, and errors that show what to write."""

import json
from typing import Any

import pytest

from orchestrator.data.columns import RowNames, named_values, with_field_names
from orchestrator.data.formats import Malformed, parse
from orchestrator.data.rows import Conversation, Instruction, Row, Text, Tokens

ASKED = Instruction("Name a colour.", "", "Blue.")
USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
TALK = Conversation((USER, ANSWER))  # type: ignore[arg-type]
TOOL = {"name": "get_temp", "parameters": {"town": {"type": "string"}}}
CALL = {"name": "get_temp", "arguments": {"town": "Oslo"}}


ABC = {"a": "instruction", "b": "input", "c": "output"}


def row_of(value: Any, columns: dict[str, Any] | None = None, row_format: Any = "auto", **roles: str) -> Row:
    spellings = (value, json.dumps(value).encode())
    first, second = (
        parse(with_field_names(each, RowNames(columns or {}, roles), row_format), row_format)
        for each in spellings
    )
    assert first == second
    return first


def reason_of(value: Any, columns: dict[str, Any] | None = None, row_format: Any = "auto") -> str:
    with pytest.raises(Malformed) as caught:
        row_of(value, columns, row_format)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "response"),
        ("query", "response"),
        ("question", "answer"),
        ("instruction", "response"),
        ("input", "output"),
        ("Question", "Answer"),
        (" instruction ", "Output"),
        ("problem", "solution"),
        ("inputs", "targets"),
        ("input_text", "output_text"),
        ("user", "assistant"),
        ("prompt", "answer"),
        ("question", "answers"),
        ("instruction", "completion"),
    ],
)
def test_usual_names_of_a_question_and_its_answer(names: tuple[str, str]) -> None:
    texts = dict(zip(names, ("Name a colour.", "Blue."), strict=True))
    assert row_of(texts) == ASKED
    assert row_of({**texts, "id": 7, "source": "x"}) == ASKED
    assert row_of({"messages": None, "text": None, **texts}) == ASKED


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Shorten.", "context": "A long text.", "response": "Text.", "category": "summary"},
        {"question": "Shorten.", "context": "A long text.", "answer": "Text."},
        {"instruction": "Shorten.", "input": "A long text.", "response": "Text."},
        {"query": "Shorten.", "input": "A long text.", "response": "Text."},
        {"Instruction": "Shorten.", "Input": "A long text.", "Output": "Text."},
    ],
)
def test_a_context_is_the_input_of_an_instruction(row: dict[str, str]) -> None:
    assert row_of(row) == Instruction("Shorten.", "A long text.", "Text.")


def test_history_and_system_of_other_names_are_kept() -> None:
    row = {
        "query": "And?",
        "response": "Red.",
        "history": [["Name one.", "Blue."]],
        "system_prompt": "Be brief.",
    }
    wanted = Instruction("And?", "", "Red.", "Be brief.", (("Name one.", "Blue."),))
    assert row_of(row) == wanted
    assert row_of({**row, "history": json.dumps(row["history"])}) == wanted


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_answers_are_tool_calls(as_text: bool) -> None:
    def stored(value: Any) -> Any:
        return json.dumps(value) if as_text else value

    row = row_of({"id": 1, "query": "How warm?", "tools": stored([TOOL]), "answers": stored([CALL])})
    assert isinstance(row, Conversation)
    assert [tool["function"] for tool in row.tools] == [TOOL]
    assert [each["function"] for each in row.messages[1]["tool_calls"]] == [CALL]
    row = row_of({"question": "How warm?", "tools": stored([TOOL]), "answer": "Warm.", "system": "Be brief."})
    assert isinstance(row, Conversation)
    assert [(each["role"], each["content"]) for each in row.messages] == [
        ("system", "Be brief."),
        ("user", "How warm?"),
        ("assistant", "Warm."),
    ]
    assert len(row.tools) == 1


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "dialogue", "Chat", "turns"])
@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}],
        [{"role": "human", "content": "Name a colour."}, {"role": "gpt", "content": "Blue."}],
        [{"role": "USER", "content": "Name a colour."}, {"role": "Assistant", "content": "Blue."}],
        [{"role": "user", "value": "Name a colour."}, {"role": "assistant", "value": "Blue."}],
        [{"from": "user", "content": "Name a colour."}, {"from": "bot", "content": "Blue."}],
        [{"speaker": "prompter", "text": "Name a colour."}, {"speaker": "assistant", "text": "Blue."}],
        [{"human": "Name a colour.", "assistant": "Blue."}],
    ],
)
@pytest.mark.parametrize("as_text", ["list", "JSON", "Python"])
def test_spellings_of_conversations(name: str, messages: list[Any], as_text: str) -> None:
    stored = {"list": messages, "JSON": json.dumps(messages), "Python": str(messages)}[as_text]
    assert row_of({"id": "x", name: stored}) == TALK


def test_a_list_of_messages_is_a_row() -> None:
    assert row_of([USER, ANSWER]) == TALK
    assert row_of([{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]) == TALK
    assert row_of([{"who": "user", "says": "Name a colour."}], {"who": "role", "says": "content"}) == (
        Conversation((USER,))  # type: ignore[arg-type]
    )
    for value in ([], [1], [{"instruction": "a", "output": "b"}]):
        assert reason_of(value) == "a list where an object with fields belongs"


@pytest.mark.parametrize(
    ("row", "columns", "wanted"),
    [
        ({"frage": "Name a colour.", "x": "Blue."}, {"frage": "instruction", "x": "output"}, ASKED),
        ({"a": "q", "b": "i", "c": "r"}, ABC, Instruction("q", "i", "r")),
        ({"a": "q", "c": "r"}, ABC, Instruction("q", "", "r")),
        ({"body": "words"}, {"body": "text"}, Text("words")),
        ({"a": "q", "b": "r"}, {"a": "prompt", "b": "completion"}, Text("r", "q")),
        ({"ids": [5, 6]}, {"ids": "input_ids"}, Tokens((5, 6), (True, True))),
        # columns decide where the row also has fields of a format
        ({"text": "page", "q": "Name a colour.", "a": "Blue."}, {"q": "instruction", "a": "output"}, ASKED),
        (
            {"instruction": "x", "q": "Name a colour.", "output": "Blue."},
            {"q": "instruction", "instruction": None},
            ASKED,
        ),
        ({"question": "Name a colour.", "answer": None}, {}, Instruction("Name a colour.", "", "")),
        ({"question": "Name a colour.", "answer": "Blue.", "solution": "B"}, {"solution": None}, ASKED),
        (
            {"log": [{"who": "user", "says": "Name a colour."}, {"who": "assistant", "says": "Blue."}]},
            {"log": "messages", "who": "role", "says": "content"},
            TALK,
        ),
        (
            {"log": json.dumps([USER, ANSWER])},
            {"log": "messages"},
            TALK,
        ),
        (
            {"dialogue": [{"who": "human", "says": "Name a colour."}, {"who": "gpt", "says": "Blue."}]},
            {"who": "role", "says": "content"},
            TALK,
        ),
    ],
)  # fmt: skip
def test_columns_say_which_field_is_which(row: Any, columns: dict[str, Any], wanted: Row) -> None:
    assert row_of(row, columns) == wanted


@pytest.mark.parametrize(
    ("row", "columns", "reason", "remedy"),
    [
        ({"frage": "a", "antwort": "b"}, {}, "the fields frage, antwort are not those of a known format",
         "columns: {frage: instruction, antwort: output} ("),
        ({"my text": "a"}, {}, "the field my text is not that", 'columns: {"my text": text} ('),
        ({"question": "a"}, {}, "the field question is not that", "columns: {question: text}"),
        ({}, {}, "the row has no fields", "remove it"),
        (USER, {}, "the row is one message (it has role, content)", "write its messages as one list"),
        ({"question": "a", "answer": "b", "solution": "c"}, {},
         "the fields answer, solution could each be output",
         "columns: {answer: output, solution: null}"),
        ({"prompt": "a", "query": "b", "answer": "c"}, {},
         "the fields prompt, query could each be instruction",
         "columns: {prompt: instruction, query: null}"),
        ({"query": "a", "input": "i", "context": "b", "answer": "c"}, {},
         "the fields input, context could each be",
         "columns: {input: input, context: null}"),
        ({"question": "a", "context": "b", "answers": {"text": ["c"], "answer_start": [0]}}, {},
         "field answers is a dict, which can hold several answers", "as text in a field answer"),
        ({"chat": [USER], "dialog": [USER]}, {}, "the fields chat, dialog could each be the messages",
         "columns: {chat: messages, dialog: null}"),
        ({"messages": [{"who": "user", "says": "a"}]}, {},
         "messages[0] has the fields who, says, and none of them",
         "columns: {who: role, says: content}"),
        ({"messages": "[user: a"}, {},
         "field messages is text, and it must be a list", "write the list as JSON"),
        ({"q": "a", "a": "b"}, {"q": "instruction", "reply": "output"},
         "column reply, which columns maps to output, is missing (found: q, a)", "correct columns"),
        ({"instruction": "x", "q": "a", "output": "b"}, {"q": "instruction"},
         "columns maps another column to instruction, and the row has a column instruction too",
         "columns: {instruction: null}"),
    ],
)  # fmt: skip
def test_fields_that_are_not_known_are_named_with_an_example(
    row: Any, columns: dict[str, Any], reason: str, remedy: str
) -> None:
    problem = reason_of(row, columns)
    assert problem.startswith(reason)
    assert remedy in problem


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"instruction": "a", "output": "b", "response": "c", "text": "d"}, "auto"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "auto"),
        ({"text": "a", "question": "b", "answer": "c"}, "auto"),
        ({"text": "a", "question": "b", "answer": "c"}, "text"),
        ({"input_ids": [1, 2], "output": "b"}, "auto"),
        ({"messages": [USER, ANSWER], "conversation": [USER]}, "auto"),
        ({"instruction": "a", "text": "b"}, "auto"),
    ],
)
def test_rows_with_the_fields_of_a_format_are_not_changed(row: dict[str, Any], row_format: Any) -> None:
    assert with_field_names(row, RowNames(), row_format) == row


def test_a_format_that_is_given_is_kept() -> None:
    assert row_of({"question": "Name a colour.", "answer": "Blue."}, row_format="alpaca") == ASKED
    assert "field text is missing (found: question, answer)" in reason_of(
        {"question": "a", "answer": "b"}, row_format="text"
    )


def test_a_row_that_is_malformed_is_named_and_the_next_one_is_read() -> None:
    values = [b"{", b'{"x": 1}', b'{"question": "a", "answer": "b"}', Malformed("it has 3 cells")]
    found = list(named_values(values, RowNames(), "auto"))
    assert found[0] == b"{"
    assert [str(each) for each in found if isinstance(each, Malformed)][1] == "it has 3 cells"
    assert found[2] == {"instruction": "a", "output": "b"}
    with pytest.raises(Malformed, match="it has 3 cells"):
        parse(found[3], "auto")


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("speaker", "text")])
def test_roles_of_the_source_are_used(keys: tuple[str, str]) -> None:
    turns = [("customer", "Name a colour."), ("agent 2", "Blue.")]
    messages = [dict(zip(keys, turn, strict=True)) for turn in turns]
    roles = {"customer": "user", "agent 2": "assistant"}
    for name in ("messages", "conversations", "dialog"):
        assert row_of({name: messages}, **roles) == TALK
    assert row_of(messages, **roles) == TALK
    swapped = [dict(zip(keys, turn, strict=True)) for turn in (("gpt", "Name a colour."), ("human", "Blue."))]
    assert row_of({"messages": swapped}, human="assistant", gpt="user") == TALK
    reason = reason_of({"messages": messages})
    assert "'customer' is unknown" in reason
    assert "data.train[].roles: {customer: user}" in reason


def test_a_call_in_the_content_of_a_role_of_the_source() -> None:
    turns = [("user", "Warm?"), ("act", json.dumps(CALL)), ("result", "4"), ("assistant", "No.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = row_of({"messages": messages}, act="function_call", result="tool")
    assert isinstance(row, Conversation)
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"]["name"] == "get_temp"
