"""Incremental JSON reading: rows do not depend on chunk sizes, errors name the row, memory is bounded."""

import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import json_stream
from orchestrator.data.json_stream import JsonTextError

BOM = b"\xef\xbb\xbf"
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(["]", ",", '"', "\\", "é", "\u2028", "😀", "[{", "\ufeff"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=4)
LAYOUTS: list[dict[str, Any]] = [{}, {"indent": 2}, {"separators": (",", ":")}, {"indent": "\t"}]


def chunks_of(data: bytes, *sizes: int) -> Callable[[], bytes]:
    """Return a reader of `data` in chunks of the given sizes in bytes, repeated cyclically."""
    stream, number = io.BytesIO(data), 0

    def read() -> bytes:
        nonlocal number
        number += 1
        return stream.read(sizes[(number - 1) % len(sizes)])

    return read


def read_all(data: bytes, *sizes: int) -> tuple[str, list[tuple[int, Any]]]:
    unit, entries = json_stream.rows(chunks_of(data, *(sizes or (2**20,))))
    return unit, [(number, value) for number, value, _ in entries]


def parsed(lines: list[tuple[int, bytes]]) -> list[tuple[int, Any]]:
    return [(number, json.loads(line)) for number, line in lines]


def problem_of(data: bytes, *sizes: int) -> str:
    with pytest.raises(JsonTextError) as caught:
        read_all(data, *sizes)
    return str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(OBJECTS, max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.sampled_from([b"", BOM, b" \r\n\t", BOM + b"\n\n"]),
)
def test_an_array_gives_the_same_rows_in_any_chunks(
    objects: list[Any], sizes: list[int], layout: dict[str, Any], escaped: bool, before: bytes
) -> None:
    data = before + json.dumps(objects, ensure_ascii=escaped, **layout).encode() + b" \n"
    assert read_all(data, *sizes) == ("row", list(enumerate(objects, 1)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(OBJECTS | st.none(), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.sampled_from([b"", BOM]),
)
def test_lines_are_the_same_in_any_chunks_and_blank_ones_keep_the_numbering(
    objects: list[Any], sizes: list[int], end: bytes, last_end: bool, before: bytes
) -> None:
    lines = [b"" if each is None else json.dumps(each, ensure_ascii=False).encode() for each in objects]
    data = before + end.join(lines) + (end if last_end else b"")
    unit, found = read_all(data, *sizes)
    assert unit == "line"
    assert parsed(found) == [(number, each) for number, each in enumerate(objects, 1) if each is not None]


@pytest.mark.parametrize("size", range(1, 20))
def test_numbers_and_words_are_not_cut_at_the_end_of_a_chunk(size: int) -> None:
    values = [1.5, -20, 1e25, 2.5e-07, 12345678, True, False, None, "😀\ud83d", [], {"a": -0.25}]
    for data in (json.dumps(values).encode(), b"[1E+2,-1.0e-3,0.0,1e5]"):
        expected = list(enumerate(json.loads(data), 1))
        assert read_all(data, size) == ("row", expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("lead", [b"", b"\n", b"\xef", b"\xef\xbb", b"a"])
def test_only_a_whole_byte_order_mark_is_passed_over(size: int, lead: bytes) -> None:
    data = BOM + lead + b'{"a": 1}'
    number = lead.count(b"\n") + 1
    assert read_all(data, size) == ("line", [(number, data[len(BOM) :].lstrip(b"\n"))])
    assert read_all(b"\xef\xbb", size) == ("line", [(1, b"\xef\xbb")])


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\n\t ", BOM, BOM + b"\n"])
def test_a_text_without_anything_has_no_lines(size: int, data: bytes) -> None:
    assert read_all(data, size) == ("line", [])


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("data", [b"[]", b" \n[ \n ] \n", BOM + b" []"])
def test_an_empty_array_has_no_rows(size: int, data: bytes) -> None:
    assert read_all(data, size) == ("row", [])


@pytest.mark.parametrize("size", range(1, 9))
def test_lines_end_at_line_feeds_alone(size: int) -> None:
    data = '1\r\n\n  \n{"a": "\u2028\u0085"}\r\n"x\x0b\x0c"\n[2]'.encode()
    unit, found = read_all(data, size)
    assert unit == "line"
    assert [(number, line.strip()) for number, line in found] == [
        (1, b"1"),
        (4, '{"a": "\u2028\u0085"}'.encode()),
        (5, b'"x\x0b\x0c"'),
        (6, b"[2]"),
    ]


def test_a_line_is_given_as_it_is_though_it_is_no_json() -> None:
    assert read_all(b"nonsense\n{\n\xff\n", 2)[1] == [(1, b"nonsense"), (2, b"{"), (3, b"\xff")]


def test_sizes_are_those_of_the_rows() -> None:
    _, entries = json_stream.rows(chunks_of(b'[ {"a":1} , {"bc":23}]', 3))
    assert [size for _, _, size in entries] == [7, 9]
    _, entries = json_stream.rows(chunks_of(b'{"a":1}\n{"bc":23}', 3))
    assert [size for _, _, size in entries] == [7, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"a": 1} {"a": 2}]', "row 2: '{' where a comma belongs"),
        (b'[{"a": 1}; {"a": 2}]', "row 2: ';' where a comma belongs"),
        (b'[{"a": 1}}', "row 2: '}' where a comma belongs"),
        (b"[", "row 1: the text ends here"),
        (b'[{"a": 1}', "row 2: the text ends here"),
        (b'[{"a": 1}, \n', "row 2: the text ends here"),
        (b'[{"a": 1},]', "row 2: Expecting value at its character 1"),
        (b'[,{"a": 1}]', "row 1: Expecting value at its character 1"),
        (b'[{"a": 1},,{"a": 1}]', "row 2: Expecting value at its character 1"),
        (b'[{"a": 1}] {"a": 2}', "row 2: there is more after the end of the array"),
        (b'[{"a": 1}]]', "row 2: there is more after the end of the array"),
        (b"[] 3", "row 1: there is more after the end of the array"),
        (b'[{"a": 1}, {"a": "2', "row 2: Unterminated string starting at its character 7"),
        (b'[{"a": 1}, {"a": 2', "row 2: Expecting ',' delimiter at its character 8"),
        (b'[{"a": 1}, {"a', "row 2: Unterminated string starting at its character 2"),
        (b"[{'a': 1}]", "row 1: Expecting property name enclosed in double quotes at its character 2"),
        (b'[{"a": 1}, {"a": nope}]', "row 2: Expecting value at its character 7"),
        (b'[{"a": "x\ny"}]', "row 1: Invalid control character at its character 9"),
        (b'[{"a": "\\q"}]', "row 1: Invalid \\escape at its character 8"),
        (b"[1, " + b"2" * 5000 + b"]", "row 2: Exceeds the limit"),
        (b'[{"a": 1}, ' + b"[" * 100_000, "row 2: maximum recursion depth"),
        (b'[{"a": 1}, ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]", "row 2: maximum recursion"),
    ],
)
def test_a_broken_array_is_named_by_its_row(data: bytes, reason: str, size: int) -> None:
    problem = problem_of(data, size if len(data) < 1000 else 5000 + size)
    assert problem.startswith(f"is not valid JSON ({reason}")
    assert problem.endswith("; repair it there")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("before", [b"", BOM, b" \n"])
def test_an_array_that_is_not_utf_8_is_named_by_its_byte(size: int, before: bytes) -> None:
    for data, place in ((b'[{"a": "caf\xe9"}]', 11), (b'[{"a": "caf\xc3', 11), (b'["\xed\xa0\xbd"]', 2)):
        problem = problem_of(before + data, size)
        assert problem.startswith("is not UTF-8 text (about byte ")
        assert problem.endswith("; convert it to UTF-8")
        said = int(problem.split("byte ")[1].split(")")[0])
        assert abs(said - len(before) - place) <= 4


def test_the_rows_before_a_break_are_given() -> None:
    _, entries = json_stream.rows(chunks_of(b'[{"a": 1}, {"a": 2}, nope]', 4))
    assert next(entries)[:2] == (1, {"a": 1})
    assert next(entries)[:2] == (2, {"a": 2})
    with pytest.raises(JsonTextError, match="row 3"):
        next(entries)


def endless(start: bytes, row: bytes, rows: int) -> tuple[Callable[[], bytes], list[int]]:
    """Return a reader that generates its text on demand, and a list with the number of bytes read so far."""
    count = [0]

    def parts() -> Iterator[bytes]:
        yield start
        for _ in range(rows):
            yield row

    source = parts()

    def read() -> bytes:
        chunk = next(source, b"")
        count[0] += len(chunk)
        return chunk

    return read, count


def test_the_window_on_a_long_array_stays_as_small_as_a_few_chunks() -> None:
    rows, chunk = 50_000, 8192
    data = json.dumps([{"number": number, "text": "é" * 20} for number in range(rows)]).encode()
    assert len(data) > 100 * chunk
    read = chunks_of(data, chunk)
    window = json_stream.TextBuffer(read(), read)
    largest = 0
    for place, (number, value, _) in enumerate(json_stream.array_rows(window)):
        largest = max(largest, len(window.text))
        assert number == place + 1 == value["number"] + 1
    assert number == rows
    assert largest <= 4 * chunk


@pytest.mark.parametrize("array", [True, False])
def test_a_long_text_is_never_whole_in_memory(array: bool) -> None:
    row = json.dumps({"text": "x" * 1000}).encode()
    start = b"[" + row if array else row + b"\n"
    read, count = endless(start, b"," + row if array else row + b"\n", 20_000)
    tracemalloc.start()
    try:
        _, entries = json_stream.rows(read)
        with pytest.raises(JsonTextError) if array else nullcontext():  # the array is not closed
            for number, _, _ in entries:
                assert number <= 20_001
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count[0] > 20_000_000
    assert peak < 1_000_000


def test_a_row_that_is_broken_ends_the_reading_and_not_the_end_of_the_text() -> None:
    read, count = endless(b"[{'a': 1}", b', {"a": 1}' * 100, 10_000)
    _, entries = json_stream.rows(read)
    with pytest.raises(JsonTextError, match="row 1: Expecting property name"):
        next(entries)
    assert count[0] < 10_000


def test_a_row_of_many_chunks_is_read_in_time() -> None:
    data = json.dumps([{"text": "x" * 300_000}, {"text": "y"}]).encode()
    unit, found = read_all(data, 64)
    assert unit == "row"
    assert [len(value["text"]) for _, value in found] == [300_000, 1]
