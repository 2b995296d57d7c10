"""Rows of Parquet, Arrow and `datasets` have the values of the same rows in JSON lines."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from orchestrator.config.schema import SourceSpec
from orchestrator.data.formats import parse
from orchestrator.data.readers import locate

WARM = {"name": "get_temp", "arguments": {"town": "Aarhus"}}
ROLL = {"name": "roll", "arguments": {"sides": 6, "content": "dice"}}


def calling(call: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    tool = {"name": call["name"], "parameters": {"type": "object", "properties": parameters}}
    return {
        "messages": [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "6"},
            {"role": "assistant", "content": "So."},
        ],
        "tools": [{"type": "function", "function": tool}],
    }


TOOL_ROWS = [
    calling(WARM, town={"type": "string"}),
    calling(ROLL, sides={"type": "integer", "enum": [6, None]}, content={"type": "string"}),
]


def read(path: Path) -> list[Any]:
    return [value for file in locate(SourceSpec(path=str(path))) for b in file.blocks() for value in b.values]


def written(folder: Path, name: str, table: pa.Table) -> Path:
    path = folder / f"rows.{name.partition('-')[0]}"
    if name == "parquet":
        parquet.write_table(table, path)
        return path
    with pa.OSFile(str(path), "wb") as file:
        new = ipc.new_stream if name == "arrow-stream" else ipc.new_file
        with new(file, table.schema) as writer:
            writer.write_table(table)
    return path


FILES = pytest.mark.parametrize("name", ["parquet", "arrow", "arrow-stream"])


@FILES
def test_keys_that_arrow_took_from_other_rows_are_removed(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist(TOOL_ROWS)
    arguments = table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"town": "Aarhus", "sides": None, "content": None}  # as Arrow gives it
    found = read(written(tmp_path, name, table))
    assert found == TOOL_ROWS
    assert [parse(each, "auto") for each in found] == [
        parse(json.dumps(each).encode(), "auto") for each in TOOL_ROWS
    ]


@FILES
@pytest.mark.parametrize("of", ["row", "message", "content", "arguments"])
def test_json_columns_are_parsed(tmp_path: Path, name: str, of: str) -> None:
    text, call = pa.json_(), pa.struct([("name", pa.string()), ("arguments", pa.json_())])
    message = {
        "message": text,
        "content": pa.struct([("role", pa.string()), ("content", text)]),
        "arguments": pa.struct(
            [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))]
        ),
    }
    kind = text if of == "row" else pa.list_(message[of])
    answers = {
        "content": [{"role": "assistant", "content": each} for each in ('A "b"', None, [{"type": "text"}])],
        "arguments": [{"role": "assistant", "content": "", "tool_calls": [WARM, ROLL]}],
    }.get(of, [{"role": "assistant", "content": None, "tool_calls": [{"function": WARM}]}])

    def as_stored(value: Any, kind: Any) -> Any:
        if isinstance(kind, pa.JsonType):
            return json.dumps(value)
        if pa.types.is_list(kind):
            return [as_stored(each, kind.value_type) for each in value]
        if pa.types.is_struct(kind):
            return {field.name: as_stored(value.get(field.name), field.type) for field in kind if value}
        return value

    def storage(kind: Any) -> Any:
        if isinstance(kind, pa.JsonType):
            return pa.string()
        if pa.types.is_list(kind):
            return pa.list_(storage(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([(field.name, storage(field.type)) for field in kind])
        return kind

    column = pa.array([as_stored(answers, kind)], storage(kind)).cast(kind)
    found = read(written(tmp_path, name, pa.table({"messages": column})))
    assert found == [{"messages": answers}]


def test_json_columns_without_a_registered_type_are_known_by_their_metadata(tmp_path: Path) -> None:
    field = pa.field("messages", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
    table = pa.table([pa.array(['[{"a": 1}]', None, "no JSON"])], schema=pa.schema([field]))
    values = [[{"a": 1}], None, "no JSON"]
    assert read(written(tmp_path, "arrow", table)) == [{"messages": each} for each in values]


@FILES
def test_a_null_content_is_an_empty_answer_as_in_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": None}]}]
    table = pa.Table.from_pylist(
        rows,
        pa.schema(
            {
                "messages": pa.list_(
                    pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})
                )
            }
        ),
    )
    assert read(written(tmp_path, name, table)) == rows


@FILES
def test_maps_are_objects_and_other_columns_stay(tmp_path: Path, name: str) -> None:
    nested = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.string())]))
    table = pa.table(
        {
            "map": pa.array([[("x", {"a": 1})], None], nested),
            "text": pa.array(["t", None]),
            "numbers": pa.array([[1, None], None], pa.large_list(pa.int64())),
            "struct": pa.array([{"a": None}, None], pa.struct([("a", pa.int64())])),
        }
    )
    assert read(written(tmp_path, name, table)) == [
        {"map": {"x": {"a": 1}}, "text": "t", "numbers": [1, None], "struct": {}},
        {"map": None, "text": None, "numbers": None, "struct": None},
    ]


def test_json_of_a_saved_dataset_is_parsed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(
        [{"messages": each["messages"]} for each in TOOL_ROWS], features=features
    ).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == [{"messages": each["messages"]} for each in TOOL_ROWS]


def test_a_null_of_json_lines_stays(tmp_path: Path) -> None:
    row = {
        "messages": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}],
            }
        ]
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (value,) = read(tmp_path / "rows.jsonl")
    assert json.loads(value) == row
