"""Sources by pattern and slices of splits: the files and rows are those that glob and `datasets` choose."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.checks.folders import with_absolute_paths
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, SourceSpec
from orchestrator.data import readers
from orchestrator.data.file_patterns import base_of, has_wildcards, matches, matching
from orchestrator.data.readers import locate
from orchestrator.data.sources import source_problem
from orchestrator.data.split_slice import split_of
from tests.unit.data.test_readers import blocks_of, lines_of, problem_of, read, source, write_parquet

ROWS = [{"text": str(number)} for number in range(10)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data/{a,b}.jsonl, data/deep/c.jsonl and files that are not rows."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.jsonl", "b.jsonl", "deep/c.jsonl")):
        (tmp_path / "data" / name).write_bytes(lines_of(ROWS[3 * number : 3 * number + 3]))
    (tmp_path / "data" / "README.md").write_text("words")
    (tmp_path / "data" / ".hidden.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("data/*.jsonl", ROWS[:6]),
        ("data/*", ROWS[:6]),
        ("data/[b-z].jsonl", ROWS[3:6]),
        ("data/[!a].jsonl", ROWS[3:6]),
        ("data/?.jsonl", ROWS[:6]),
        ("data/**/*.jsonl", ROWS[:9]),
        ("data/*/*.jsonl", ROWS[6:9]),
        ("**/c.jsonl", ROWS[6:9]),
    ],
)
def test_a_pattern_reads_the_files_that_match(folder: Path, pattern: str, rows: list[Any]) -> None:
    for path in (pattern, f"{folder}/{pattern}", f"./{pattern}"):
        assert source_problem(source(path)) is None
        assert read(path) == rows
    names = [file.name for file in locate(source(pattern))]
    assert all(Path(name).is_file() and not Path(name).is_absolute() for name in names)
    assert read(f"file://{folder}/{pattern}") == rows


def test_a_pattern_without_files_is_an_error(folder: Path) -> None:
    wanted = (
        f"data path data/*.json matches no file; correct the pattern, which counts from {folder} if relative"
    )
    assert problem_of("data/*.json") == wanted == source_problem(source("data/*.json"))
    assert "has no file with rows" in problem_of(f"file://{folder}/data/*.json")


def test_files_of_several_splits_that_match_need_one_named(folder: Path) -> None:
    for number, name in enumerate(("train", "test")):
        (folder / f"{name}.jsonl").write_bytes(lines_of(ROWS[number : number + 1]))
    assert "holds several splits (test, train)" in problem_of("*.jsonl")
    assert read("*.jsonl", split="test") == ROWS[1:2]


def test_a_file_whose_name_has_wildcards_is_read_as_it_is(folder: Path) -> None:
    (folder / "a[1].jsonl").write_bytes(lines_of(ROWS[:1]))
    (folder / "a1.jsonl").write_bytes(lines_of(ROWS[1:2]))
    assert read("a[1].jsonl") == ROWS[:1]


def test_files_without_a_known_extension_match_if_no_other_does(folder: Path) -> None:
    for number in range(2):
        (folder / f"part-{number}").write_bytes(lines_of(ROWS[number : number + 1]))
    assert read("part-*") == ROWS[:2]


def test_patterns_of_a_job_are_absolute_in_its_run(folder: Path) -> None:
    paths = ("data/*.jsonl", "s3://bucket/*.jsonl", "org/name")
    data = DataSpec(train=tuple(SourceSpec(path=path) for path in paths))
    job = with_absolute_paths(JobSpec(name="a", model=ModelSpec(path="m"), data=data))
    assert [each.path for each in job.data.train] == [f"{folder}/data/*.jsonl", *paths[1:]]


@pytest.mark.parametrize(
    "pattern", ["*", "**", "**/*.jsonl", "d*/?.jsonl", "data/[ab].jsonl", "data/**", "da[!x]a/*"]
)
def test_patterns_of_uris_match_as_those_of_paths(folder: Path, pattern: str) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    visible = [name for name in names if ".hidden" not in name]
    assert sorted(name for name in visible if matches(name, pattern)) == matching(pattern)


def test_the_folder_of_a_pattern() -> None:
    assert [base_of(path) for path in ("a/b/*.c", "a/b*/c", "*.c", "/a/[x]/c", "a/b")] == [
        "a/b/",
        "a/",
        "",
        "/a/",
        "a/b",
    ]
    assert [has_wildcards(path) for path in ("a/b", "a*", "a?", "a[b")] == [False, True, True, True]


SLICES = [
    "[:3]",
    "[7:]",
    "[2:5]",
    "[-4:]",
    "[:-4]",
    "[:20%]",
    "[20%:]",
    "[15%:35%]",
    "[-25%:]",
    "[:]",
    "[3:100]",
]


@pytest.mark.parametrize("part", SLICES)
@pytest.mark.parametrize("files", [1, 3])
def test_a_slice_is_that_of_datasets(tmp_path: Path, part: str, files: int) -> None:
    size = -(-len(ROWS) // files)
    for number in range(files):
        rows = ROWS[number * size : (number + 1) * size]
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    paths = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    wanted = datasets.load_dataset(
        "json", data_files=paths, split=f"train{part}", cache_dir=str(tmp_path / "cache")
    )
    assert read(tmp_path / "*.jsonl", split=f"train{part}") == list(wanted)
    if files == 1:
        assert read(paths[0], split=f"train{part}") == list(wanted)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(-60, 60), st.integers(-60, 60), st.sampled_from(["", "%"]))
def test_the_rows_of_a_slice_are_those_of_a_list(count: int, start: int, stop: int, unit: str) -> None:
    name, part = split_of(f"train[{start}{unit}:{stop}{unit}]")
    assert name == "train"
    assert part is not None
    first, last = part.rows(count)
    if not unit:
        assert list(range(count))[first:last] == list(range(count))[start:stop]
    assert 0 <= first <= last <= max(count, first)


def test_slices_of_tables_and_blocks_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    rows = [{"number": number} for number in range(10_000)]
    write_parquet(tmp_path / "rows.parquet", rows)
    blocks = blocks_of(locate(source(tmp_path / "rows.parquet", split="train[4000:50%]")))
    assert [value for block in blocks for value in block.values] == rows[4000:5000]
    assert [number for block in blocks for number in block.numbers] == list(range(4001, 5001))


def test_a_slice_counts_rows_only_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines_of(ROWS))
    counted: list[str] = []
    count = readers.DataFile.count
    monkeypatch.setattr(readers.DataFile, "count", lambda file: counted.append(file.name) or count(file))
    assert read(tmp_path / "rows.jsonl", split="train[2:4]") == ROWS[2:4]
    assert counted == []
    assert read(tmp_path / "rows.jsonl", split="train[-2:]") == ROWS[8:]
    assert len(counted) == 1


def test_slices_that_select_nothing_or_are_not_of_a_split_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_of(ROWS))
    wanted = f"data {path} has 10 rows, and split=train[5:3] selects none of them; widen it"
    assert problem_of(path, split="train[5:3]") == wanted
    assert "selects none of them" in problem_of(path, split="train[:0%]")
    for split in ("train", "test[:3]"):
        assert (
            f"is one file and has no splits; remove split={split}, or write split: train[:1000]"
            in problem_of(path, split=split)
        )
    for split in ("train[", "train[3]", "train[:3", "train[a:b]", "train[:3%%]", "[:3]", "train[:3]x"):
        with pytest.raises(ValidationError):
            SourceSpec(path="a", split=split)


def test_a_slice_of_a_folder_is_of_the_split(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(ROWS[5 * number : 5 * number + 5]))
    assert read(tmp_path, split="test[1:3]") == ROWS[6:8]
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:4])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "sets")
    assert read(tmp_path / "sets", split="test[-1:]") == ROWS[3:4]


def test_a_slice_of_the_hub_is_cut_from_the_whole_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "cache", num_shards=2)
    asked: list[Any] = []

    def load(path: str, subset: str | None = None, **more: Any) -> Any:
        asked.append(more["split"])
        return datasets.load_from_disk(tmp_path / "cache")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert read("org/rows", split="validation[30%:70%]") == ROWS[3:7]
    assert asked == ["validation"]
