"""Marks that say what not to learn are obeyed, under the names of other trainers, or refused."""

from typing import Any

import pytest

from orchestrator.data.chat_template import RESPONSE
from orchestrator.data.formats import parse, read
from orchestrator.data.rows import Conversation, Instruction, Text
from tests.unit.data.talks import encoded
from tests.unit.data.test_formats import assistant, reason_of, turn, user

NOT_LEARNT = [
    {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss": 0}, {"loss_mask": 0}, {"loss_mask": False},
    {"train": False}, {"training": False}, {"trainable": False}, {"loss_weight": 0.0}, {"loss_scale": 0},
    {"masked": True}, {"weight": 1, "loss": False},
]  # fmt: skip
LEARNT = [{"weight": 1}, {"loss": True}, {"loss_mask": 1.0}, {"train": True}, {"masked": False}]


@pytest.mark.parametrize("fields", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("marks", "weight"), [*[(each, 0) for each in NOT_LEARNT], *[(each, 1) for each in LEARNT]]
)
def test_marks_of_messages(fields: str, marks: dict[str, Any], weight: int) -> None:
    asked, wrong, right = user("One?"), assistant("Wrong."), assistant("Right.")
    if fields == "conversations":
        asked, wrong, right = turn("human", "One?"), turn("gpt", "Wrong."), turn("gpt", "Right.")
    row = read({fields: [asked, wrong | marks, asked, right]}, "auto")
    assert isinstance(row.row, Conversation)
    assert row.row.messages == (
        user("One?"), assistant("Wrong.", weight=weight), user("One?"), assistant("Right."),
    )  # fmt: skip
    assert not row.use.without_effect
    assert not row.use.for_template


def test_what_is_marked_is_not_learnt(tokenizer: Any) -> None:
    row = {"messages": [user("One?"), assistant("Wrong.", loss=False), user("Two?"), assistant("Right.")]}
    result = encoded(parse(row, "auto"), tokenizer)
    learnt = tokenizer.decode(result.tokens[result.turn >= RESPONSE])
    assert "Right." in learnt
    assert "Wrong." not in learnt


@pytest.mark.parametrize("field", ["weight", "weights", "loss", "loss_mask", "train"])
@pytest.mark.parametrize("marks", [[0, 1], [0, 0, 0, 1], [1, 0, 1, 1], [False, True]])
def test_lists_of_a_row_mark_its_messages_or_answers(field: str, marks: list[Any]) -> None:
    talk = [user("One?"), assistant("Wrong."), user("Two?"), assistant("Right.")]
    row = read({"messages": talk, field: marks}, "auto")
    assert isinstance(row.row, Conversation)
    assert [each.get("weight") for each in row.row.messages if each["role"] == "assistant"] == [0, 1]
    assert not row.use.without_effect
    reason = reason_of({"messages": talk, field: [0, 1, 1]})
    assert reason.startswith(f"field {field} has 3 entries for 4 messages, 2 of them answers; ")


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "messages[1].weight=0.5 must be 0 (not learnt) or 1; weigh whole sources"),
        ({"loss": 2}, "messages[1].loss=2 must be 0 (not learnt) or 1; "),
        ({"loss_scale": 0.3}, "messages[1].loss_scale=0.3 must be 0 (not learnt) or 1; "),
        ({"train": "no"}, "messages[1].train='no' must be 0 (not learnt) or 1"),
        ({"train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail marks parts of a message"),
        ({"mask": True}, "messages[1].mask=True may mean that the message is learnt, or that it is not"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(mark: dict[str, Any], reason: str) -> None:
    assert reason_of({"messages": [user(), assistant(**mark)]}).startswith(reason)


ROWS: list[tuple[dict[str, Any], Any]] = [
    ({"messages": [user(), assistant()]}, Conversation((user(), assistant()))),
    ({"conversations": [turn("human", "Hi?"), turn("gpt", "Hi.")]}, Conversation((user(), assistant()))),
    ({"instruction": "a", "output": "b"}, Instruction("a", "", "b")),
    ({"prompt": "a", "completion": "b"}, Text("b", "a")),
]


@pytest.mark.parametrize(("row", "parsed"), ROWS)
def test_answers_that_are_marked_as_bad_are_refused(row: dict[str, Any], parsed: Any) -> None:
    for mark in ({"label": False}, {"kto_tag": False}, {"kto_tag": "False"}):
        (name,) = mark
        assert reason_of({**row, **mark}).startswith(f"field {name} is false: the answer is a bad one")
    for mark in ({"label": True}, {"kto_tag": True}, {"label": 0}, {"label": "false"}, {"label": 3}):
        assert parse({**row, **mark}, "auto") == parsed
        assert read({**row, **mark}, "auto").use.without_effect == set(mark)


@pytest.mark.parametrize(("row", "parsed"), ROWS)
def test_preferences_are_refused(row: dict[str, Any], parsed: Any) -> None:
    rejected: list[dict[str, Any]] = [
        {"rejected": "c"}, {"chosen": "b", "rejected": "c"}, {"rejected_response": "c"},
        {"rejected_messages": [assistant("c")]}, {"chosen": [assistant()], "rejected": [assistant("c")]},
    ]  # fmt: skip
    for more in rejected:
        reason = reason_of({**row, **more})
        assert reason.startswith(f"the row is a preference (it has {', '.join(more)}), and this trains on")
        assert "columns" in reason
    assert reason_of({"prompt": "a", "chosen": "b", "rejected": "c"}).startswith("the row is a preference")
    nothing = {"chosen": None, "rejected": None, "rejected_response": ""}
    assert parse({**row, **nothing}, "auto") == parsed


@pytest.mark.parametrize(("row", "parsed"), ROWS)
def test_weights_of_a_row_are_refused_unless_they_are_one(row: dict[str, Any], parsed: Any) -> None:
    for name in ("weight", "loss_weight", "sample_weight"):
        assert reason_of({**row, name: 0.5}).startswith(f"field {name} is 0.5, and rows have no weight; ")
        assert parse({**row, name: 1}, "auto") == parsed
    for mark in ({"loss": False}, {"train": False}, {"weight": 0}, {"loss_weight": 0.0}, {"trainable": 0}):
        assert "the row is not to be learnt; remove it" in reason_of({**row, **mark})
    assert "not to be learnt" in reason_of({**row, "masked": True})
    assert reason_of({**row, "mask": "Assistant"}).startswith("field mask=Assistant says that answers are")
    assert read({**row, "mask": "User", "loss": 0.7}, "auto").use.without_effect == {"mask", "loss"}
