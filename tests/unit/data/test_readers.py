"""Data files: every format and location is read back as written, and errors name the file."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from orchestrator.config.paths import resolve
from orchestrator.config.schema import SourceSpec
from orchestrator.data import readers
from orchestrator.data.readers import Block, DataFile, locate
from orchestrator.data.sources import source_problem
from orchestrator.errors import SpecError

ROWS = [{"instruction": f"Say {number}.", "output": f"é{number}"} for number in range(5)]
TABLE = pa.Table.from_pylist(ROWS)


def lines_of(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_bytes(lines_of(rows))


def write_gzipped_json(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


def write_gzipped_lines(path: Path, rows: list[Any]) -> None:
    # Two gzip members in one file, as from `cat a.gz b.gz`.
    path.write_bytes(gzip.compress(lines_of(rows[:2])) + gzip.compress(lines_of(rows[2:])))


def write_zstandard(path: Path, rows: list[Any]) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(lines_of(rows))


def write_parquet(path: Path, rows: list[Any]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def write_arrow_file(path: Path, rows: list[Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_stream(path: Path, rows: list[Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


KINDS: list[tuple[str, Callable[[Path, list[Any]], None]]] = [
    ("rows.json", write_json),
    ("rows.json", write_lines),
    ("rows.jsonl", write_lines),
    ("rows.ndjson", write_lines),
    ("rows.v1.2.jsonl", write_lines),
    ("rows.txt", write_lines),
    ("rows", write_json),
    ("rows.json.gz", write_gzipped_json),
    ("rows.jsonl.gz", write_gzipped_lines),
    ("rows.jsonl.zst", write_zstandard),
    ("rows.parquet", write_parquet),
    ("rows.arrow", write_arrow_file),
    ("rows.arrow", write_arrow_stream),
]


def source(path: Path | str, **more: Any) -> SourceSpec:
    return SourceSpec(path=str(path), **more)


def blocks_of(found: list[DataFile]) -> list[Block]:
    return [block for file in found for block in file.blocks()]


def read(path: Path | str, **more: Any) -> list[Any]:
    values = [value for block in blocks_of(locate(source(path, **more))) for value in block.values]
    return [json.loads(value) if isinstance(value, bytes) else value for value in values]


def problem_of(path: Path | str, **more: Any) -> str:
    with pytest.raises(SpecError) as caught:
        blocks_of(locate(source(path, **more)))
    (problem,) = caught.value.problems
    assert str(path) in problem
    return problem


@pytest.mark.parametrize(("name", "write"), KINDS)
def test_every_kind_of_file_is_read_back(
    tmp_path: Path, name: str, write: Callable[[Path, list[Any]], None]
) -> None:
    path = tmp_path / name
    write(path, ROWS)
    assert read(path) == ROWS
    (file,) = locate(source(path))
    assert file.name == file.path == str(path)
    assert read(f"file://{path}") == ROWS
    numbers = [number for block in file.blocks() for number in block.numbers]
    assert numbers == [1, 2, 3, 4, 5]
    unit = "line" if write in (write_lines, write_gzipped_lines, write_zstandard) else "row"
    assert next(file.blocks()).source_line(0) == f"data file {path}, {unit} 1"


def test_a_relative_path_and_one_from_home_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "rows é #%20.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("rows é #%20.jsonl") == ROWS
    assert read("~/rows é #%20.jsonl") == ROWS
    assert resolve("~/rows.json") == tmp_path / "rows.json"
    assert resolve("rows.json") == Path("rows.json")
    assert (resolve("builtin/tiny-llama") / "config.json").is_file()


def test_builtin_data_is_found_with_and_without_its_ending() -> None:
    train = read("builtin/alpaca_sample")
    assert len(train) == 320
    assert read("builtin/alpaca_sample.jsonl") == train
    held_out = read("builtin/alpaca_sample_eval")
    assert len(held_out) == 32
    assert not [row for row in held_out if row in train]
    assert source_problem(source("builtin/alpaca_sample")) is None
    assert "is not there" in problem_of("builtin/none")
    (file,) = locate(source("builtin/alpaca_sample"))
    assert next(file.blocks()).source_line(1) == "data file builtin/alpaca_sample, line 2"


@pytest.mark.parametrize("file_uri", [False, True])
def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, file_uri: bool) -> None:
    (tmp_path / "b").mkdir()
    write_parquet(tmp_path / "b" / "0.parquet", ROWS[3:])
    write_parquet(tmp_path / "a-1.parquet", ROWS[2:3])
    write_gzipped_json(tmp_path / "a-0.json.gz", ROWS[:2])
    for name in ("README.md", ".hidden.json", "_SUCCESS.json", "dataset_infos.json", "notes.txt"):
        (tmp_path / name).write_text("no rows")
    path = f"file://{tmp_path}" if file_uri else str(tmp_path)
    for each in (path, path + "/"):
        assert read(each) == ROWS
    found = locate(source(path + "/"))
    ends = ["/a-0.json.gz", "/a-1.parquet", "/b/0.parquet"]
    assert [file.path for file in found] == [str(tmp_path) + end for end in ends]
    assert all(file.name.startswith(path) for file in found)
    assert all(file.name.endswith(end.lstrip("/")) for file, end in zip(found, ends, strict=True))


@pytest.mark.parametrize("file_uri", [False, True])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train_0.parquet", "test_0.parquet"),
        ("my_train.parquet", "my_test.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("data.train.parquet", "data.test.parquet"),
    ],
)
def test_a_folder_of_several_splits_is_read_only_if_one_is_named(
    tmp_path: Path, train: str, test: str, file_uri: bool
) -> None:
    folder = tmp_path / "train-data"  # the folder's own name does not select a split
    for name, rows in ((train, ROWS[:3]), (test, ROWS[3:])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / name, rows)
    path = f"file://{folder}" if file_uri else str(folder)
    problem = problem_of(path)
    assert problem.startswith(f"data folder {path} holds several splits (test, train)")
    assert problem.endswith("say which is meant with split: NAME")
    assert read(path, split="train") == ROWS[:3]
    assert read(path, split="test") == ROWS[3:]
    problem = problem_of(path, split="tes")
    assert problem.startswith(f"data folder {path} has no file of split=tes among ['")
    assert problem.endswith("; name another")


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.parquet", "train-1.parquet"],
        ["train.parquet", "more.parquet"],
        ["trains.parquet", "testing.parquet"],
        ["contest.parquet", "evaluation.parquet"],
        ["train/a.parquet", "train/b.parquet"],
    ],
)
def test_a_folder_of_one_split_needs_none_named(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, ROWS[2 * number : 2 * number + 2])
    assert sorted(row["output"] for row in read(tmp_path)) == [f"é{number}" for number in range(4)]


def test_a_data_set_that_was_saved_is_read_from_its_arrow_files(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS).filter(lambda row: row["output"] != "é1")
    saved.save_to_disk(tmp_path / "set", num_shards=2)
    assert read(tmp_path / "set") == [ROWS[0], *ROWS[2:]]
    assert [file.name for file in locate(source(f"{tmp_path}/set/"))] == [
        f"{tmp_path}/set/data-0000{number}-of-00002.arrow" for number in range(2)
    ]


def test_a_saved_dictionary_of_data_sets_needs_a_split(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "sets")
    assert read(tmp_path / "sets", split="train") == ROWS[:3]
    assert read(tmp_path / "sets", split="test") == ROWS[3:]
    (file,) = locate(source(tmp_path / "sets", split="test"))
    assert file.name == file.path
    for split in (None, "eval"):
        problem = problem_of(tmp_path / "sets", split=split)
        assert f"has the splits train, test, and split={split} is none of them" in problem
        assert problem.endswith("say which is meant with split: NAME")


@pytest.mark.parametrize(
    ("name", "text", "split"),
    [
        ("dataset_dict.json", "nonsense", "train"),
        ("dataset_dict.json", "{}", "train"),
        ("dataset_dict.json", '{"splits": 3}', "train"),
        ("dataset_dict.json", '{"splits": ["train"]}', "train"),  # the folder of the split is missing
        ("state.json", "nonsense", None),
        ("state.json", "{}", None),
        ("state.json", '{"_data_files": [1]}', None),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', None),
    ],
)
def test_a_saved_data_set_that_is_damaged_is_one_problem(
    tmp_path: Path, name: str, text: str, split: str | None
) -> None:
    (tmp_path / name).write_text(text)
    problem = problem_of(tmp_path, split=split)
    assert problem.startswith(f"data file {tmp_path}/")
    assert "cannot be read (" in problem


def test_blocks_are_bounded_in_rows_and_their_numbers_go_on(tmp_path: Path) -> None:
    rows = [{"number": number} for number in range(10_000)]
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"\n\n" + lines_of(rows))
    for name, write in KINDS[:1] + KINDS[-3:]:
        path = tmp_path / name
        write(path, rows)
        blocks = blocks_of(locate(source(path)))
        assert max(len(block.values) for block in blocks) <= 4096
        assert [value for block in blocks for value in block.values] == rows
        assert [number for block in blocks for number in block.numbers] == list(range(1, 10_001))
        assert blocks[-1].source_line(len(blocks[-1].values) - 1) == f"data file {path}, row 10000"
    blocks = blocks_of(locate(source(lines)))
    assert [len(block.values) for block in blocks] == [4096, 4096, 1808]
    assert blocks[1].source_line(0) == f"data file {lines}, line 4099"
    assert json.loads(blocks[1].values[0]) == rows[4096]


@pytest.mark.parametrize(("name", "write"), [KINDS[0], KINDS[2], *KINDS[-4:]])
def test_blocks_are_bounded_in_bytes(
    tmp_path: Path, name: str, write: Callable[[Path, list[Any]], None]
) -> None:
    size = 300_000
    rows = [{"text": str(number) * size} for number in range(10)] * 4
    path = tmp_path / name
    table = pa.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif write is write_arrow_file:
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)  # one record batch
    else:
        write(path, rows)
    blocks = blocks_of(locate(source(path)))
    assert max(len(block.values) for block in blocks) * size < 4 * 2**20 + size
    assert [number for block in blocks for number in block.numbers] == list(range(1, 41))
    assert read(path) == rows


def test_a_row_larger_than_a_block_is_a_block(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b" * 5 * 2**20}, {"text": "c"}]
    for name, write in (KINDS[0], KINDS[2], KINDS[-3], KINDS[-1]):
        write(tmp_path / name, rows)
        assert read(tmp_path / name) == rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrow"])
def test_an_empty_table_or_text_has_no_blocks(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(TABLE.slice(0, 0), path)
    elif name.endswith(".arrow"):
        with ipc.new_file(str(path), TABLE.schema):
            pass
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert blocks_of(locate(source(path))) == []


def test_a_fingerprint_is_of_the_bytes_alone(tmp_path: Path) -> None:
    prints = []
    for name, rows in (("a.jsonl", ROWS), ("b.json.gz", ROWS), ("c.jsonl", ROWS[::-1]), ("d.jsonl", ROWS)):
        write_lines(tmp_path / name, rows)
        prints.append(DataFile(name, str(tmp_path / name), "json", "gzip" if "gz" in name else None))
    a, b, c, d = (file.fingerprint() for file in prints)
    assert a == b == d != c
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert prints[0].fingerprint() == a
    assert prints[0].stamp() == ((tmp_path / "a.jsonl").stat().st_size, 10**9)
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"\n")
    assert prints[0].fingerprint() != a
    assert DataFile("uri", str(tmp_path / "d.jsonl"), "json", None, f"file://{tmp_path}").fingerprint() == a


def test_a_file_that_changes_while_it_is_hashed_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS)
    (file,) = locate(source(tmp_path / "rows.jsonl"))
    stamps = iter([(1, 1), (2, 1)])
    monkeypatch.setattr(DataFile, "_stamp", lambda _: next(stamps))
    with pytest.raises(SpecError, match="changed while it was read"):
        file.fingerprint()


def test_a_data_set_of_the_hub_is_read_from_the_files_it_is_cached_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "cache", num_shards=2)
    asked: list[Any] = []

    def load(path: str, subset: str | None = None, **more: Any) -> Any:
        asked.append((path, subset, more))
        return datasets.load_from_disk(tmp_path / "cache")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert read("org/rows") == ROWS
    found = locate(source("org/rows", subset="small", split="test", revision="v1.2"))
    assert asked == [
        ("org/rows", None, {"split": "train", "revision": None}),
        ("org/rows", "small", {"split": "test", "revision": "v1.2"}),
    ]
    assert [file.name for file in found] == [
        f"org/rows/data-0000{number}-of-00002.arrow" for number in (0, 1)
    ]
    assert len(found[0].fingerprint()) == 64


def test_a_data_set_of_the_hub_that_cannot_be_loaded_is_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\n" + "x" * 1000)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    problem = problem_of("org/rows", subset="small")
    assert problem.startswith(
        "data set org/rows (subset small, split train) cannot be loaded from the hub, and no such file is "
        "here (Couldn't reach the hub xxx"
    )
    assert problem.endswith("; check the name, split and network")
    assert len(problem) < 500
    assert "subset default, split test" in problem_of("org/rows", split="test")


def test_a_path_that_is_here_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write_lines(tmp_path / "org" / "rows", ROWS)
    assert read("org/rows") == ROWS


def test_the_bounds_are_those_that_are_written_down() -> None:
    assert readers._ROWS_PER_BLOCK == 4096
    assert readers._BYTES_PER_BLOCK == 4 * 2**20
