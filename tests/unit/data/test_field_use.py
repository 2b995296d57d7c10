"""Fields that training does not depend on are counted by name, from the row to the statistics of `pack`."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.run_tables import packing_table
from orchestrator.data.corpus import TokenCounts
from orchestrator.data.encode_rows import encode_values
from orchestrator.data.field_use import FieldUse, fields_without_effect
from orchestrator.data.formats import read
from orchestrator.data.rows import REASONING_FIELDS
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from tests.unit.data.talks import with_template
from tests.unit.data.test_formats import CALL, TOOL, assistant, turn, user


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": "a", "output": "b", "id": 7, "text": "x", "m": {"url": "x"}}, {"id", "text", "m"}),
        ({"instruction": "a", "output": "b", "source": None, "tags": [], "note": ""}, set()),
        ({"messages": [user(), assistant()], "score": 0.0, "ok": False, "tool_choice": "auto"},
         {"score", "ok", "tool_choice"}),
        ({"messages": [user(), assistant()], "conversations": [turn("human", "a")]}, {"conversations"}),
        ({"conversations": [turn("human", "a") | {"markdown": "x"}, turn("gpt", "b")], "dataset": "d"},
         {"dataset", "conversations.markdown"}),
        ({"messages": [user() | {"loss": True, "name": "Ann"}, assistant(score=1)]},
         {"messages.loss", "messages.name", "messages.score"}),
        ({"messages": [user([{"type": "text", "text": "a", "cache_control": {"type": "e"}}]), assistant()]},
         {"messages.content.cache_control"}),
        ({"messages": [user(), assistant("", tool_calls=[{**CALL, "id": "1", "index": 2}])], "tools": [TOOL]},
         {"messages.tool_calls.index"}),
        ({"messages": [user() | {"reasoning": "hm"}, assistant(reasoning="hm")]}, {"messages.reasoning"}),
        ({"prompt": "a", "completion": "b", "language": "en"}, {"language"}),
        ({"text": "a", "url": "x", "label": False}, {"url", "label"}),
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "length": 2}, {"length"}),
    ],
)  # fmt: skip
def test_fields_that_are_not_used(row: dict[str, Any], names: set[str]) -> None:
    assert fields_without_effect(read(row, "auto").use, "{{ messages }}", never) == names


def never(field: str) -> bool:
    raise AssertionError(f"asked for {field}, which the template does not have")


def test_a_field_that_the_template_reads_has_an_effect() -> None:
    use = FieldUse({"id"}, {"messages.name": ("name",), "messages.reasoning": REASONING_FIELDS})

    def of(template: object) -> set[str]:
        return fields_without_effect(use, template, lambda field: field == "name")

    assert of(None) == {"id", "messages.name", "messages.reasoning"}
    assert of("{{ message.name }}") == {"id", "messages.reasoning"}
    assert of("{{ message['thinking'] }} {{ filename }}") == {"id", "messages.name"}
    assert of("{% if enable_thinking %}{% endif %}") == {"id", "messages.name", "messages.reasoning"}
    assert of({"default": "{{ m.name }}", "tool": "{{ m.thinking }}"}) == {"id"}
    assert fields_without_effect(use, "{{ m.name }} {{ m.thinking }}", lambda _: False) == {
        "id", "messages.name",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("addition", "names"),
    [
        ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}", ["messages.name"]),
        ("{% for message in messages %}{{ message.name or '' }}{% endfor %}", []),
        ("{% if messages[0].role == 'system' %}{{ messages[0].name }}{% endif %}", ["messages.name"]),
        ("{{ messages[0].name }}", []),
    ],
)
def test_a_name_that_the_template_reads_elsewhere_has_no_effect(
    addition: str, names: list[str], tokenizer: Any
) -> None:
    row = {"messages": [user() | {"name": "Ann"}, assistant()]}
    changed = with_template(tokenizer, tokenizer.chat_template + addition)
    assert list(encode_values([row], "auto", changed, "chat", "answers").fields_without_effect) == names


def test_rows_are_counted_by_the_names_of_such_fields(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": [user(), assistant()], "id": 1, "source": "s"},
        {"messages": [user(), assistant(reasoning="hm"), user(), assistant()], "id": 2},
        {"messages": [user(), assistant("")], "id": 3},
        {"messages": [user(), assistant("", weight=2)], "id": 4},
    ]
    result = encode_values(rows, "auto", tokenizer, "chat", "answers")
    assert result.fields_without_effect == {"id": 2, "source": 1, "messages.reasoning": 1}
    reading = with_template(tokenizer, tokenizer.chat_template + "{# message.reasoning_content #}")
    assert encode_values(rows, "auto", reading, "chat", "answers").fields_without_effect == {
        "id": 2,
        "source": 1,
    }
    encoded = list(result.encoded.values())
    shards = [
        write_shard(tmp_path, number, encoded, fields_without_effect=result.fields_without_effect)
        for number in range(2)
    ]
    write_index(tmp_path, shards, {})
    counts = {"id": 4, "messages.reasoning": 2, "source": 2}
    assert TokenStore(tmp_path).manifest["fields_without_effect"] == counts


def test_counts_of_sources_are_added_and_printed() -> None:
    counts = TokenCounts(rows=1, fields_without_effect={"id": 1, "b": 2}) + TokenCounts(
        rows=2, fields_without_effect={"a": 3, "id": 4}
    )
    assert counts == TokenCounts(rows=3, fields_without_effect={"a": 3, "b": 2, "id": 5})
    figures = {"rows": 3, "fields_without_effect": counts.fields_without_effect, "notes": {}, "sources": []}
    assert packing_table(figures).splitlines()[1].split(maxsplit=1) == [
        "fields_without_effect", "a (3 rows), b (2 rows), id (5 rows)",
    ]  # fmt: skip
    assert packing_table({**figures, "fields_without_effect": {}}).splitlines()[1].endswith("  none")
