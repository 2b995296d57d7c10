"""Damaged, missing and misplaced files: each gives one error that names the file."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.data.readers import DataFile, locate
from orchestrator.data.sources import looks_like_hub_name, source_problem
from orchestrator.errors import SpecError
from tests.unit.data.test_readers import (
    KINDS,
    ROWS,
    problem_of,
    source,
    write_lines,
)


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    text = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(100_000))
    for name, whole in (
        ("rows.jsonl.gz", gzip.compress(text, 1)),
        ("rows.jsonl.zst", pa.Codec("zstd").compress(text).to_pybytes()),
    ):
        path = tmp_path / name
        path.write_bytes(whole[:-1000])
        assert problem_of(path).startswith(f"data file {path} cannot be read (")
        path.write_bytes(b"plain text" + whole)
        assert problem_of(path).startswith(f"data file {path} cannot be read (")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("content", [b"nope", b"PAR1" * 5, b'{"instruction": "a", "output": "b"}\n' * 50])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    for each in (str(path), f"file://{path}"):
        problem = problem_of(each)
        assert problem.startswith(f"data file {each} cannot be read (")
        assert problem.endswith("; check that it is there, whole and readable")


@pytest.mark.parametrize(("name", "write"), KINDS[-3:-1])
def test_a_table_that_is_cut_off_is_named(
    tmp_path: Path, name: str, write: Callable[[Path, list[Any]], None]
) -> None:
    path = tmp_path / name
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read (" in problem_of(path)


def test_values_of_a_table_that_are_none_are_named(tmp_path: Path) -> None:
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"], pa.binary()).buffers())
    late = pa.array([2**62], pa.timestamp("us"))
    for number, column in enumerate((latin, late)):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table({"text": column}), path)
        assert problem_of(path).startswith(f"data file {path} cannot be read (")


def test_an_array_that_is_broken_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}')
    assert problem_of(path).startswith(f"data file {path} is not valid JSON (row 3: the text ends here)")
    path.write_bytes(b'[{"instruction": "caf\xe9"}]')
    assert problem_of(path).startswith(f"data file {path} is not UTF-8 text (about byte 21)")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_that_is_compressed_as_a_whole_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(gzip.compress(b"rows"))
    problem = problem_of(path)
    assert problem == (
        f"data file {path} is a compressed {kind} file; unpack it (only JSON, CSV and text are unpacked)"
    )


@pytest.mark.parametrize("file_uri", [False, True])
def test_a_folder_without_data_files_is_named(tmp_path: Path, file_uri: bool) -> None:
    (tmp_path / "notes.md").write_text("none")
    path = f"file://{tmp_path}" if file_uri else str(tmp_path)
    problem = problem_of(path)
    assert problem.startswith(f"data folder {path} has no file with rows; its files must end in .json, ")
    assert problem_of(path, split="train").startswith(f"data folder {path} has no file of split=train")


def test_paths_where_nothing_is_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("none.json", f"{tmp_path}/none.json", "~nobody-of-this-name/rows.json", "builtin/none", "a"):
        sentence = f"data file {path} is not there; check the path, which counts from {tmp_path} if relative"
        assert problem_of(path) == sentence == source_problem(source(path))
    assert problem_of("file:///none/rows.json").startswith(
        "data file file:///none/rows.json is not there; check the URI"
    )
    for uri in ("nosuch://place/rows.json", "file://host name/rows.json", "://"):
        assert problem_of(uri).startswith(f"data file {uri} cannot be read (")


def test_paths_that_cannot_be_looked_at_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a" * 5000 + ".json"
    assert problem_of(long).startswith(f"data file {long} cannot be read (File name too long)")
    assert source_problem(source(long)) is not None
    nul = source("a").model_copy(update={"path": "a\0b.json"})  # a job file cannot contain NUL
    with pytest.raises(SpecError) as caught:
        locate(nul)
    assert caught.value.problems[0].startswith("data file a\0b.json ")
    assert source_problem(nul) is not None

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setattr(Path, "stat", refuse)
    assert problem_of(tmp_path / "rows.jsonl").startswith(
        f"data file {tmp_path}/rows.jsonl cannot be read (Permission denied)"
    )


def test_a_file_that_is_gone_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    (file,) = locate(source(path))
    path.unlink()
    steps: list[Callable[[], Any]] = [file.fingerprint, file.stamp, lambda: list(file.blocks())]
    for step in steps:
        with pytest.raises(SpecError, match="cannot be read") as caught:
            step()
        assert caught.value.problems[0].startswith(f"data file {path} cannot be read (")
    bad = DataFile("the name", "a\0b", "json")
    for step in (bad.fingerprint, bad.stamp, lambda: list(bad.blocks())):
        with pytest.raises(SpecError, match="data file the name cannot be read"):
            step()


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("tatsu-lab/alpaca", True),
        ("HuggingFaceH4/ultrachat_200k", True),
        ("org/data-v1.0", True),
        ("data/train", True),
        ("org/data.json", False),
        ("org/data.jsonl", False),
        ("org/data.parquet", False),
        ("org/data.arrow", False),
        ("org/data.jsonl.gz", False),
        ("org/data.zst", False),
        ("alpaca", False),
        ("a/b/c", False),
        ("/org/data", False),
        ("./org/data", False),
        ("../data", False),
        ("~/data", False),
        ("org/", False),
        ("org/.data", False),
        ("org/da ta", False),
        ("org/data\n", False),
        ("builtin/none", False),
        ("here/rows", False),
        ("here", False),
    ],
)
def test_what_can_be_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, hub: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here" / "rows").mkdir(parents=True)
    assert looks_like_hub_name(path) is hub
    (tmp_path / "here" / "rows" / "a.jsonl").write_text("{}")
    there = path.startswith("here")
    assert (source_problem(source(path)) is None) is (hub or there)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/rows.json", "gs://bucket/rows", "file:///none", "hdfs://host/a"]
)
def test_nothing_is_asked_whether_a_uri_is_there(uri: str) -> None:
    assert source_problem(source(uri)) is None
