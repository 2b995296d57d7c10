"""Files as people have them: each kind is read to the same rows, and a wrong kind is one error."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.columns import named_values
from orchestrator.data.formats import Malformed, parse
from orchestrator.data.readers import locate
from orchestrator.data.rows import Conversation, Instruction, Row, Text
from orchestrator.data.tokenize import blocks_of as blocks_of_source
from orchestrator.errors import SpecError
from tests.unit.data.test_readers import blocks_of, problem_of, source, write_parquet

ASKED = [Instruction("Name a colour.", "", "Blue."), Instruction("Say é, please", "x\ny", 'A "plum"')]
ROWS = [{"instruction": row.instruction, "input": row.input, "output": row.output} for row in ASKED]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'instruction,input,output\nName a colour.,,Blue.\n"Say é, please","x\ny","A ""plum"""\n'
USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
TURNS = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
TALK = Conversation((USER, ANSWER))  # type: ignore[arg-type]


def rows_of(path: Path | str, **more: Any) -> list[Row | str]:
    """Return the rows of a source; for a malformed one its place and reason."""
    found: list[Row | str] = []
    for block in blocks_of(locate(source(path, **more))):
        named = named_values(block.values, block.names, "auto")
        for at, value in enumerate(named):
            try:
                found.append(parse(value, "auto"))
            except Malformed as problem:
                found.append(f"{block.source_line(at).removeprefix(f'data file {path}, ')}: {problem}")
    return found


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", CSV),
        ("rows.CSV", "\ufeff" + CSV.replace("\n", "\r\n").replace("x\r\ny", "x\ny")),
        ("rows.csv", "\n\n" + CSV),
        ("rows.csv", CSV.replace(",", ";").replace("é;", "é,")),
        ("rows.tsv", CSV.replace(",", "\t").replace("é\t", "é,")),
        ("rows.csv", CSV.replace(",", "\t").replace("é\t", "é,")),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.csv", "sep=|\n" + CSV.replace(",", "|").replace("é|", "é,")),
        ("rows.csv", CSV.encode("utf-16")),
        ("rows.jsonl", LINES),
        ("rows.jsonl", "\ufeff" + LINES),
        ("rows.jsonl", LINES.encode("utf-16")),
        ("rows.jsonl", LINES.encode("utf-16-le")),
        ("rows.jsonl", LINES.encode("utf-16-be")),
        ("rows.jsonl", LINES.encode("utf-32")),
        ("rows.json", json.dumps(ROWS).encode("utf-16")),
        ("rows.jsonl.bz2", bz2.compress(LINES[:40].encode()) + bz2.compress(LINES[40:].encode())),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())),
        ("rows.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.jsonl", lzma.compress(LINES.encode())),
        ("rows.txt", LINES),
        ("rows.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("rows.jsonl", " ".join(json.dumps(row) for row in ROWS)),
        ("rows.json", json.dumps({"version": "1.0", "data": ROWS})),
        (
            "rows.json",
            json.dumps({"version": "1.0", "data": ROWS, "more": {"a": [1]}, "tags": ["x"]}, indent=1),
        ),
        ("rows.jsonl", json.dumps({"data": ROWS}) + "\n"),
        ("rows.json", '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = written(tmp_path, name, content)
    assert rows_of(path) == ASKED
    assert rows_of(f"file://{path}") == ASKED


def test_cells_are_text(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "question,answer\n007,1.50\nnull,NaN\nTrue,\n,2\n")
    assert rows_of(path)[:3] == [
        Instruction("007", "", "1.50"),
        Instruction("null", "", "NaN"),
        Instruction("True", "", ""),
    ]
    assert str(rows_of(path)[3]).startswith("line 5: fields instruction and input are empty")


def test_records_are_named_by_their_first_line_and_other_counts_of_cells_are_malformed(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, "rows.csv", 'question,answer\n"a\nb",c\nd\ne,f,g\nh,i\n')
    (block,) = blocks_of(locate(source(path)))
    assert block.source_line(0) == f"data file {path}, line 2"
    assert rows_of(path)[1:3] == [
        "line 4: 1 cells where the first line names 2 columns; write cells with delimiters or line ends in "
        "double quotes",
        "line 5: 3 cells where the first line names 2 columns; write cells with delimiters or line ends in "
        "double quotes",
    ]
    assert rows_of(path)[3] == Instruction("h", "", "i")


def test_columns_name_those_of_a_table(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "Nr,Frage,Antwort\n1,Name a colour.,Blue.\n")
    columns = {"Frage": "instruction", "Antwort": "output"}
    assert rows_of(path, columns=columns) == ASKED[:1]
    (problem,) = rows_of(path)
    assert str(problem).startswith("line 2: the fields Nr, Frage, Antwort are not those of a known format; ")
    assert "columns: {Nr: instruction, Antwort: output}" in str(problem)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_column_that_a_table_does_not_have_is_one_error(tmp_path: Path, name: str) -> None:
    rows = [{"frage": "a", "antwort": "b"}] * 3
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("frage,antwort\n" + "a,b\n" * 3)
    else:
        write_parquet(path, rows)
    named = {"frage": "instruction", "antwort": "output", "who": "role"}
    assert rows_of(path, columns=named) == [Instruction("a", "", "b")] * 3
    for key in ("input", "output", None):
        problem = problem_of(path, columns={"frage": "instruction", "reply": key})
        assert problem == (
            f"data file {path} has no column reply, which columns names (found: frage, antwort); correct "
            "data.train[].columns"
        )


@pytest.mark.parametrize("stored", [json.dumps, str])
def test_conversations_in_cells_are_read(tmp_path: Path, stored: Callable[[Any], str]) -> None:
    cell = stored([USER, ANSWER]).replace('"', '""')
    assert rows_of(written(tmp_path, "rows.csv", f'id,messages\n1,"{cell}"\n')) == [TALK]


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.txt", "\ufeffA line, of text.\r\n\n  {not JSON} \u2028 x\n \nthe end")
    assert rows_of(path) == [Text("A line, of text."), Text("  {not JSON} \u2028 x"), Text("the end")]
    (block,) = blocks_of(locate(source(path)))
    assert block.numbers == (1, 3, 5)


def test_lines_that_are_lists_of_messages_are_rows(tmp_path: Path) -> None:
    lines = [json.dumps(each) for each in ([USER, ANSWER], TURNS)]
    assert rows_of(written(tmp_path, "two.jsonl", "\n".join(lines))) == [TALK, TALK]
    for number, line in enumerate(lines):
        path = written(tmp_path, f"{number}.jsonl", line + "\n")
        assert rows_of(path) == [TALK]
        assert blocks_of(locate(source(path)))[0].unit == "line"
    assert rows_of(written(tmp_path, "array.json", f"[{', '.join(lines)}]")) == [TALK, TALK]
    assert rows_of(written(tmp_path, "list.json", json.dumps({"data": [[USER, ANSWER]]}, indent=2))) == [TALK]
    broken = written(tmp_path, "broken.jsonl", f"{lines[0]}\n[1]\n[{{\n{lines[1]}\n")
    assert rows_of(broken)[::3] == [TALK, TALK]
    assert [str(each)[:7] for each in rows_of(broken)[1:3]] == ["line 2:", "line 3:"]


def test_the_list_of_an_object_is_chosen_by_field_if_there_are_several(tmp_path: Path) -> None:
    whole = {"train": ROWS, "test": ROWS[:1], "none": [], "n": 2}
    for layout in (None, 1):
        path = written(tmp_path, "rows.json", json.dumps(whole, indent=layout))
        assert rows_of(path, field="train") == ASKED
        assert rows_of(path, field="test") == ASKED[:1]
        assert rows_of(path, field="none") == []
        assert problem_of(path) == (
            f"data file {path} has several lists (train, test); say which has the rows with field: train"
        )
        assert problem_of(path, field="eval") == (
            f"data file {path} has no list eval (found: train, test, none, n; lists: train, test, none); "
            "correct field: eval"
        )
    (block,) = blocks_of(locate(source(path, field="train")))
    assert block.source_line(1) == f"data file {path}, row 2"


@pytest.mark.parametrize("layout", [None, 2])
@pytest.mark.parametrize(
    ("row", "columns", "wanted"),
    [
        ({"messages": [USER, ANSWER]}, {}, TALK),
        ({"id": 3, "conversations": TURNS}, {}, TALK),
        ({"query": "a", "tools": [], "response": "b"}, {}, Instruction("a", "", "b")),
        ({"log": [USER, ANSWER], "tools": [{"name": "f"}]}, {"log": "messages"}, None),
    ],
)
def test_an_object_that_is_a_row_is_one(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], wanted: Row | None, layout: int | None
) -> None:
    (found,) = rows_of(written(tmp_path, "row.jsonl", json.dumps(row, indent=layout)), columns=columns)
    assert found == wanted or (wanted is None and isinstance(found, Conversation))


def test_field_is_refused_where_it_has_no_meaning(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", CSV),
        ("a.txt", "words"),
    ):
        problem = problem_of(written(tmp_path, name, content), field="data")
        assert "remove field" in problem


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())
    else:
        with zipfile.ZipFile(file, "w") as bundle:
            bundle.writestr("[Content_Types].xml" if kind == "docx" else "rows.jsonl", LINES)
    return file.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute("create table rows (a text)")
    return (folder / "a.db").read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
WRONG: list[tuple[str, bytes, str, str]] = [
    ("rows.jsonl", packed("zip"), "is a ZIP archive; ", "unpack it, and name a file or folder"),
    ("rows.parquet", packed("zip"), "is a ZIP archive; ", "unpack it"),
    ("rows.csv", packed("docx"), "is an Office document; ", "end its name in .xlsx"),
    ("rows.json", packed("tar"), "is a tar archive; ", "unpack it"),
    ("rows.tar.gz", gzip.compress(packed("tar")), "is a tar archive; ", "unpack it"),
    ("rows.tgz", gzip.compress(packed("tar")), "is a tar archive; ", "unpack it"),
    ("rows.jsonl", POINTER, "is a pointer of Git LFS and not the data; ", "run `git lfs pull`"),
    ("rows.parquet", POINTER, "is a pointer of Git LFS and not the data; ", "run `git lfs pull`"),
    ("rows.xlsx", POINTER, "is a pointer of Git LFS and not the data; ", "run `git lfs pull`"),
    ("rows.jsonl", PAGE, "is a page of HTML or XML and not data", "download the file itself"),
    ("rows.parquet", b"\n" + PAGE.lower(), "is a page of HTML or XML and not data", "download the file"),
    ("rows.csv", b'<?xml version="1.0"?><Error/>', "is a page of HTML or XML and not data", "download"),
    ("rows.json", b"PAR1" + b"\0" * 40, "is a Parquet file; ", "end its name in .parquet"),
    ("rows.json", b"ARROW1\0\0" + b"\0" * 40, "is an Arrow file; ", "end its name in .arrow"),
    ("rows.parquet", gzip.compress(b"x"), "is compressed (gzip)", "unpack it"),
    ("rows.json", b"%PDF-1.7\n", "is a PDF document; ", ".txt or .jsonl"),
    ("rows.json", pickle.dumps(ROWS), "is a pickle of Python; ", "JSON lines"),
    ("rows.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a document of an old version of Office; ", "save"),
    ("rows.bin", b"\x01\x02\0\0\x07words", "is a binary file and not text; ", "JSON lines, Parquet or CSV"),
    ("rows.yaml", b"- instruction: a\n  output: b\n", "is YAML, which is not read; ", "convert it"),
    ("rows.json", b"- instruction: a\n  output: b\n" * 50, "is not JSON (it begins with '- ins", "one JSON"),
    ("rows.jsonl", CSV.encode(), "is not JSON (it begins with 'instruction,input,output')", "in .csv"),
    ("rows.json", b"{'text': 'a'}\n" * 9, "is not valid JSON (line 1: \"'\" where a", "rep"),
    ("rows.json", b'{"data": [\n{"a": 1},\n{"a": 2}\n', "is not valid JSON (row 3: the text ends", "rep"),
    ("rows.json", b'{\n "a": 1\n "b": 2\n}\n', "is not valid JSON (line 3: ", "repair"),
    ("rows.jsonl", ('{"text": "caf\xe9"}\n' * 9).encode("latin-1"), "is not UTF-8 text (line 1); ", "iconv"),
    ("rows.csv", "text\na\ncaf\xe9\n".encode("latin-1"), "is not UTF-8 text (line 3); ", "iconv -f"),
    ("rows.txt", "a\n\ncaf\xe9\n".encode("latin-1"), "is not UTF-8 text (line 3); ", "iconv -f"),
    ("rows.csv", b'question,answer\na,b\n"c,d\ne,f\n', "is not valid CSV (line 3: ", "write each"),
    ("rows.csv", b"question,answer\ra,b\r", "has lines that end with CR alone; ", "save it with LF"),
    ("rows.csv", b"text,text\na,b\n", "has the column 'text' more than once (text, text); ", "a differ"),
    ("rows.tsv", b"question,answer\na,b\n", "has commas and no tab in its first line", "end its name"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "reason", "remedy"), WRONG, ids=[f"{name}: {reason}" for name, _, reason, _ in WRONG]
)
def test_a_wrong_kind_of_file_is_one_error_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, reason: str, remedy: str
) -> None:
    path = written(tmp_path, name, content)
    problem = problem_of(path)
    assert problem.startswith(f"data file {path} {reason}")
    assert remedy in problem[len(reason) :]


def test_a_database_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.json", database(tmp_path))
    assert "is an SQLite database; export the table" in problem_of(path)


def test_single_lines_of_another_encoding_are_malformed_rows(tmp_path: Path) -> None:
    lines = ['{"text": "é"}'.encode(), b'{"text": "caf\xe9"}', b'{"text": "b"}']
    assert [str(row)[:8] for row in rows_of(written(tmp_path, "a.jsonl", b"\n".join(lines)))] == [
        "Text(com", "line 2: ", "Text(com",
    ]  # fmt: skip
    assert str(rows_of(written(tmp_path, "b.jsonl", lines[1]))[0]).startswith("line 1: not UTF-8 text")


def test_broken_lines_among_others_are_malformed_rows(tmp_path: Path) -> None:
    content = '{"text": "a"\n{"text": "b"}\n{"text": }\n\nnonsense\n{"text": "c"}\n'
    found = rows_of(written(tmp_path, "a.jsonl", content))
    assert [found[at] for at in (1, 4)] == [Text("b"), Text("c")]
    assert [str(found[at]).split(":")[0] for at in (0, 2, 3)] == ["line 1", "line 3", "line 5"]
    assert str(rows_of(written(tmp_path, "b.jsonl", '{"text": "a"'))[0]).startswith("line 1: not valid JSON")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_files_without_anything_have_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = written(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    assert rows_of(path) == []


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path, "a.csv", "instruction,output\n")) == []


def test_a_folder_of_csv_files_is_read_and_one_of_several_kinds_is_not(tmp_path: Path) -> None:
    written(tmp_path, "b.csv", CSV)
    written(tmp_path, "a.tsv", CSV.replace(",", "\t").replace("é\t", "é,"))
    written(tmp_path, "README.txt", "words")
    assert rows_of(tmp_path) == [*ASKED, *ASKED]
    written(tmp_path, "c.jsonl", LINES)
    problem = problem_of(tmp_path)
    assert problem.endswith(
        "has files of several kinds (.csv, .jsonl, .tsv); name those meant with a pattern, such as *.csv"
    )
    assert rows_of(f"{tmp_path}/*.csv") == ASKED
    for name in ("a.tsv", "b.csv", "c.jsonl"):
        (tmp_path / name).unlink()
    assert rows_of(tmp_path) == [Text("words")]


def test_blocks_of_long_tables_are_bounded(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text\n" + "".join(f"row {number}\n" for number in range(10_000)))
    blocks = blocks_of(locate(source(path)))
    assert [len(block.values) for block in blocks] == [4096, 4096, 1808]
    assert blocks[-1].source_line(1807) == f"data file {path}, line 10001"
    assert blocks[-1].values[-1] == {"text": "row 9999"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_roles_of_the_source_are_those_of_its_files(tmp_path: Path, name: str) -> None:
    spoken = [("customer", "Name a colour."), ("agent", "Blue.")]
    turns = [{"speaker": role, "text": text} for role, text in spoken]
    if name.endswith(".parquet"):
        write_parquet(tmp_path / name, [{"talk": turns}])
    else:
        written(tmp_path, name, json.dumps({"talk": turns}) + "\n")
    columns, roles = {"talk": "messages"}, {"customer": "user", "agent": "assistant"}
    assert rows_of(tmp_path / name, columns=columns, roles=roles) == [TALK]


def test_an_optional_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    rows = [{"frage": "a", "antwort": "b"}, {"frage": "a", "antwort": "b", 'über "x"': "c"}]
    lines = [json.dumps(row, ensure_ascii=is_ascii) for row in rows for is_ascii in (True, False)]
    path = written(tmp_path, "rows.jsonl", "\n".join(lines))
    asked: dict[str, Any] = {"frage": "instruction", "antwort": "output"}
    found = {'über "x"': "input", "kein": None}
    files = locate(source(path, columns=asked | found))
    assert sum(len(block.values) for block in blocks_of_source([*files, *files])) == 8
    files = locate(source(path, columns=asked | {"wishes": "input"}))
    blocks = blocks_of_source([*files, *files])
    assert len(next(blocks).values) == 4
    with pytest.raises(SpecError) as caught:
        list(blocks)
    assert caught.value.problems == (
        f"no row of data file {path} and 1 more has the column wishes, which columns maps to input; correct "
        "data.train[].columns",
    )
