"""The same rows give the same tokens and labels, whichever kind of file holds them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from orchestrator.config.schema import SourceSpec
from orchestrator.data.chat_template import Encoded
from orchestrator.data.encode_rows import encode_block
from orchestrator.data.readers import locate
from tests.unit.data.test_formats import assistant, turn, user
from tests.unit.data.test_table_values import ROLL, WARM, calling

RESULT = {"role": "tool", "content": "6"}
TEXT_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"b": 1.0,  "a": null}'}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "tools": [
        calling(WARM, town={"type": "string"}),
        calling(ROLL, sides={"type": "integer"}, content={"type": "string", "default": "dice"}),
    ],
    "arguments as text": [
        {
            "messages": [user(), assistant("", tool_calls=[TEXT_CALL]), RESULT, assistant()],
            "tools": '[{"name": "f"}]',
        },
        {"messages": [user("Hi again?"), assistant(None), user(), assistant("Yes.")], "tools": None},
    ],
    "marks": [
        {"messages": [user(), assistant("No.", loss=False), user(), assistant()], "source": "s"},
        {"messages": [user(), assistant(), user(), assistant("Yes.", name="Ann")], "score": 0.5},
    ],
    "parts": [
        {"messages": [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "b"}])]},
        {"messages": [user([{"type": "text", "value": "a"}]), assistant([{"type": "text", "text": "c"}])]},
    ],
    "sharegpt": [
        {"conversations": [turn("human", "a"), turn("gpt", "b") | {"weight": 0}, *[turn("gpt", "d")] * 2]},
        {"conversations": [turn("system", "s"), turn("human", "a"), turn("gpt", "b")], "id": 1},
    ],
    "alpaca": [
        {"instruction": "a", "input": "i", "output": "b", "history": [["q", "w"]]},
        {"instruction": "a", "output": "b", "system": "s"},
    ],
    "tokens": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6, 7]}],
}  # fmt: skip


def _jsonl(path: Path, rows: list[Any]) -> str:
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "rows.jsonl"


def _json(path: Path, rows: list[Any]) -> str:
    (path / "rows.json").write_text(json.dumps(rows, indent=1))
    return "rows.json"


def _csv(path: Path, rows: list[Any]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: json.dumps(each) if isinstance(each, list) else each for name, each in row.items()}
            )
    return "rows.csv"


def _parquet(path: Path, rows: list[Any]) -> str:
    parquet.write_table(_table(rows), path / "rows.parquet")
    return "rows.parquet"


def _stream(path: Path, rows: list[Any]) -> str:
    table = _table(rows)
    with pa.OSFile(str(path / "rows.arrow"), "wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return "rows.arrow"


def _saved(path: Path, rows: list[Any]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(_table(rows)).save_to_disk(str(path / "saved"))
    return "saved"


def _json_feature(path: Path, rows: list[Any]) -> str:
    datasets = pytest.importorskip("datasets")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = datasets.Features({name: datasets.Json() for name in names})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(path / "json"))
    return "json"


def _loaded(path: Path, rows: list[Any]) -> str:
    """The Arrow files of the cache of `datasets`, as a hub dataset of JSON files has them."""
    datasets = pytest.importorskip("datasets")
    _jsonl(path, rows)
    loaded = datasets.load_dataset(
        "json", data_files=str(path / "rows.jsonl"), cache_dir=str(path / "cache"), split="train"
    )
    (file,) = loaded.cache_files
    return str(Path(file["filename"]).relative_to(path))


def _table(rows: list[Any]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def tokens_of(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    encoded: list[Encoded] = []
    for file in locate(SourceSpec(path=str(path))):
        for block in file.blocks():
            result = encode_block(block, "auto", tokenizer, "chat", "answers")
            assert not result.malformed
            encoded += result.encoded.values()
    return [(each.tokens.tolist(), each.turn.tolist()) for each in encoded]


@pytest.mark.parametrize("write", [_json, _csv, _parquet, _stream, _saved, _json_feature, _loaded])
@pytest.mark.parametrize("name", list(ROWS))
def test_a_kind_of_file_changes_no_token(
    tmp_path: Path, tool_tokenizer: Any, name: str, write: Callable[[Path, list[Any]], str]
) -> None:
    rows = ROWS[name]
    expected = tokens_of(tmp_path / _jsonl(tmp_path, rows), tool_tokenizer)
    assert len(expected) == len(rows)
    assert tokens_of(tmp_path / write(tmp_path, rows), tool_tokenizer) == expected
