"""Reading rows: the formats that are taken, and every malformed row named by its place."""

import json
from pathlib import Path

import pytest

from orchestrator.data.source import Row, read_alpaca
from orchestrator.errors import SpecError
from orchestrator.paths import resolve

GOOD = {"instruction": "Say hi.", "input": "", "output": "Hi."}


def write(folder: Path, text: str) -> str:
    file = folder / "rows.json"
    file.write_text(text, encoding="utf-8")
    return str(file)


def problems_of(path: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        read_alpaca(path)
    return caught.value.problems


def test_a_json_array_is_read_in_order(tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "input": "x" if n else "", "output": f"o{n}"} for n in range(3)]
    path = write(tmp_path, "\n " + json.dumps(rows, indent=2))
    assert read_alpaca(path) == [Row("0", "", "o0"), Row("1", "x", "o1"), Row("2", "x", "o2")]


def test_json_lines_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = write(
        tmp_path, '{"instruction": "a", "output": "b"}\r\n\n   \n{"instruction": "c\u2028", "output": "d"}'
    )
    assert read_alpaca(path) == [Row("a", "", "b"), Row("c\u2028", "", "d")]


@pytest.mark.parametrize("array", [True, False])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, array: bool) -> None:
    text = json.dumps([GOOD] if array else GOOD)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_alpaca(str(tmp_path / "bom")) == [Row("Say hi.", "", "Hi.")]


def test_optional_fields(tmp_path: Path) -> None:
    row = {"instruction": None, "input": "only input", "output": "o", "system": "be kind", "id": 7}
    assert read_alpaca(write(tmp_path, json.dumps([row]))) == [Row("", "only input", "o", "be kind")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", "a list where an object with instruction and output belongs"),
        ('"text"', "a str where"),
        ("null", "a NoneType where"),
        ("{}", "field instruction is missing (found: nothing); add it"),
        ('{"instruction": "a", "response": "b"}', "field output is missing (found: instruction, response)"),
        ('{"instruction": 1, "output": "b"}', "field instruction is a int, and it must be text"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "field input is a int"),
        ('{"instruction": "a", "output": ["b"]}', "field output is a list"),
        ('{"instruction": "a", "output": " \\n"}', "field output is empty"),
        ('{"instruction": "a", "output": null}', "field output is empty"),
        ('{"instruction": " ", "input": "", "output": "b"}', "fields instruction and input are empty"),
        ('{"instruction": "\\ud83d", "output": "b"}', "field instruction holds half of a surrogate pair"),
    ],
)
def test_a_malformed_row_is_named_by_its_place(tmp_path: Path, row: str, reason: str) -> None:
    good = json.dumps(GOOD)
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f"{good}\n\n{row}\n{good}\n", encoding="utf-8")
    (problem,) = problems_of(str(lines))
    assert problem.startswith(f"data file {lines}, line 3: {reason}")
    array = write(tmp_path, f"[{good}, {row}]")
    (problem,) = problems_of(array)
    assert problem.startswith(f"data file {array}, row 2: {reason}")


@pytest.mark.parametrize("line", ["{", "{'a': 1}", "nonsense", '{"a": ' + "1" * 5000 + "}", '{"a":' * 5000])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, json.dumps(GOOD) + "\n" + line)
    (problem,) = problems_of(path)
    assert problem.startswith(f"data file {path}, line 2: not valid JSON (")


@pytest.mark.parametrize("text", ["[", '[{"instruction": "a"', "[1, 2] 3", "[" * 5000])
def test_an_array_that_is_not_json_is_one_problem(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"data file {path} is not valid JSON (")


def test_ten_malformed_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(["3"] * 25))
    problems = problems_of(path)
    assert len(problems) == 11
    assert problems[9].startswith(f"data file {path}, line 10: ")
    assert problems[10] == f"data file {path}: 15 more malformed rows"
    assert len(problems_of(write(tmp_path, "\n".join(["3"] * 10)))) == 10


@pytest.mark.parametrize("text", ["", "\n\n", "[]", " [ ] "])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert problems_of(path) == (
        f"data file {path} has no rows; give at least one row with instruction and output",
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in problems_of(str(tmp_path / "none.json"))[0]
    assert "cannot be read (Is a directory" in problems_of(str(tmp_path))[0]
    assert "cannot be read (No such file" in problems_of("~nobody-of-this-name/rows.json")[0]
    assert "cannot be read (embedded null byte)" in problems_of("a\0b")[0]
    (tmp_path / "latin").write_bytes(b'[{"instruction": "caf\xe9"}]')
    assert "is not UTF-8 text (byte 21)" in problems_of(str(tmp_path / "latin"))[0]


def test_builtin_data_is_found_with_and_without_its_ending() -> None:
    train = read_alpaca("builtin/alpaca_sample")
    assert len(train) == 320
    assert read_alpaca("builtin/alpaca_sample.jsonl") == train
    held_out = read_alpaca("builtin/alpaca_sample_eval")
    assert len(held_out) == 32
    assert not set(held_out) & set(train)
    assert "cannot be read (No such file" in problems_of("builtin/none")[0]


def test_paths_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert resolve("~/rows.json") == Path("/somewhere/rows.json")
    assert resolve("rows.json") == Path("rows.json")
    assert (resolve("builtin/tiny-llama") / "config.json").is_file()
