"""Token stores: rows are read back as written, counts come from the index, and damaged files are named."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import token_cache as store_module
from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, RESPONSE, Encoded
from orchestrator.data.token_cache import (
    EMPTY,
    MALFORMED,
    MANIFEST,
    PARTLY_EMPTY,
    LossOn,
    TokenStore,
    is_trained,
    write_index,
    write_shard,
)
from orchestrator.errors import ClusterError

LEAST: dict[LossOn, int] = {"all": CONTEXT, "response": RESPONSE, "last_turn": LAST_RESPONSE}
LOSSES = list(LEAST)


def row(number: int, turns: Sequence[int]) -> Encoded:
    tokens = np.arange(len(turns), dtype=np.uint32) + 1000 * number
    return Encoded(tokens, np.array(turns, dtype=np.uint8))


def write(folder: Path, *shards: Sequence[Encoded]) -> TokenStore:
    """Write shards of rows as a store and open it."""
    write_index(folder, [write_shard(folder, number, rows) for number, rows in enumerate(shards)], {})
    return TokenStore(folder)


def four_rows() -> tuple[list[Encoded], list[Encoded]]:
    return [row(0, [0, 0, 1]), row(1, [2])], [row(2, [0, 1, 0, 2, 2]), row(3, [0, 2])]


def assert_same(read: Encoded, written: Encoded) -> None:
    assert read.tokens.dtype == np.uint32
    assert read.turn.dtype == np.uint8
    assert read.tokens.tolist() == written.tokens.tolist()
    assert read.turn.tolist() == written.turn.tolist()


# Reading


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        row(number, [0] * (length // 2) + [2] * (length - length // 2))
        for number, length in enumerate([3, 1, 7, 4, 2, 0, 5])
    ]
    rows[0].tokens[0] = 2**32 - 1
    store = write(tmp_path, [], rows[:2], [], [], rows[2:6], rows[6:], [])
    assert len(store) == 7
    assert store.lengths.tolist() == [3, 1, 7, 4, 2, 0, 5]
    assert store.lengths.dtype == np.int64
    for number in (0, 1, 2, 3, 4, 5, 6, 1, 6, 0):
        assert_same(store.row(number), rows[number])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=4), max_size=5))
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]]) -> None:
    rows = [[row(number, turns) for number, turns in enumerate(shard)] for shard in shards]
    store = write(tmp_path_factory.mktemp("store"), *rows)
    written = [each for shard in rows for each in shard]
    assert len(store) == len(written)
    for number, each in enumerate(written):
        assert_same(store.row(number), each)


def test_a_store_of_nothing_opens(tmp_path: Path) -> None:
    for number, shards in enumerate(([], [[]], [[], []])):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = write(folder, *shards)
        assert len(store) == 0
        assert store.lengths.tolist() == []
        assert store.malformed == []
        assert store.manifest["rows"] == store.manifest["tokens"] == 0


def test_the_manifest_counts_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    first, second = four_rows()
    shards = [
        write_shard(tmp_path, 0, first, [("a.jsonl, line 2", "field output is empty")]),
        write_shard(tmp_path, 1, second),
    ]
    write_index(tmp_path, shards, {"template": "chat", "source": "a.jsonl"})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["template"] == "chat"
    assert manifest["source"] == "a.jsonl"
    assert manifest["rows"] == 4
    assert manifest["tokens"] == 11
    assert manifest["rows_malformed"] == 1
    assert [rows for rows, _ in manifest["shards"]] == [2, 2]


def test_rows_that_are_left_out_are_listed_with_their_place(tmp_path: Path) -> None:
    found = [("a.jsonl, line 2", "no “output”"), ("b.jsonl, line 9", "two\nlines\u2028and \u0085 more")]
    shards = [
        write_shard(tmp_path, 0, [row(0, [0, 2])], found[:1], found, found[1:]),
        write_shard(tmp_path, 1, [], found[1:], [], found[:1]),
    ]
    write_index(tmp_path, shards, {})
    store = TokenStore(tmp_path)
    assert (store.malformed, store.empty, store.partly_empty) == (found, found, found[::-1])
    counts = [store.manifest[name] for name in ("rows", "rows_malformed", "rows_empty", "rows_partly_empty")]
    assert counts == [1, 2, 2, 2]


def test_rows_cannot_be_written_to(tmp_path: Path) -> None:
    read = write(tmp_path, *four_rows()).row(0)
    with pytest.raises(ValueError, match="read-only"):
        read.tokens[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        read.turn[0] = 1


def test_a_row_outlives_its_store(tmp_path: Path) -> None:
    first, second = four_rows()
    kept = write(tmp_path, first, second).row(2)
    assert_same(kept, second[0])


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, four_rows()[0])
    assert not (tmp_path / MANIFEST).exists()
    write_index(tmp_path, [shard], {})
    manifest = (tmp_path / MANIFEST).stat().st_mtime_ns
    assert all(file.stat().st_mtime_ns <= manifest for file in tmp_path.iterdir())


def test_an_index_that_cannot_be_written_leaves_no_manifest(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, four_rows()[0])
    (tmp_path / MALFORMED).mkdir()
    with pytest.raises(OSError, match="directory"):
        write_index(tmp_path, [shard], {})
    assert not (tmp_path / MANIFEST).exists()


def test_more_shards_than_are_held_open_are_read_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    rows = [row(number, [0, 1, 2]) for number in range(12)]
    store = write(tmp_path, *(rows[at : at + 2] for at in range(0, 12, 2)))
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 5)).tolist()
    kept = [(number, store.row(number)) for number in order]
    for number, read in kept:
        assert_same(read, rows[number])
    every = np.arange(12)
    assert store.trained(every, every * 0, every * 0 + 2, "response").tolist() == [1] * 12


# Trained tokens


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[tuple[int, int, int]]]:
    """Draw shards of rows given by their turn labels, and parts of rows as (row, first token, length)."""
    turns = st.lists(st.integers(0, 2), max_size=9)
    shards = draw(st.lists(st.lists(turns, max_size=4), min_size=1, max_size=4))
    rows = [each for shard in shards for each in shard]
    parts = []
    for _ in range(draw(st.integers(0, 12)) if rows else 0):
        number = draw(st.integers(0, len(rows) - 1))
        start = draw(st.integers(0, len(rows[number])))
        parts.append((number, start, draw(st.integers(0, len(rows[number]) - start))))
    return shards, parts


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from(LOSSES))
def test_trained_tokens_of_parts_are_counted_right(
    tmp_path_factory: pytest.TempPathFactory,
    problem: tuple[list[list[list[int]]], list[tuple[int, int, int]]],
    loss_on: LossOn,
) -> None:
    shards, parts = problem
    store = write(
        tmp_path_factory.mktemp("store"),
        *([row(number, turns) for number, turns in enumerate(shard)] for shard in shards),
    )
    rows = [each for shard in shards for each in shard]
    chosen = [rows[number][start : start + length] for number, start, length in parts]
    numbers, starts, lengths = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    counts = store.trained(numbers, starts, lengths, loss_on)
    assert counts.dtype == np.int64
    assert counts.tolist() == [sum(turn >= LEAST[loss_on] for turn in part[1:]) for part in chosen]
    for part, count in zip(chosen, counts.tolist(), strict=True):
        assert is_trained(np.array(part, dtype=np.uint8), loss_on).sum() == count


def test_whole_rows_are_counted_without_their_tokens(tmp_path: Path) -> None:
    store = write(tmp_path, *four_rows())
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    every = np.arange(4)
    assert store.trained(every, every * 0, store.lengths, "all").tolist() == [2, 0, 4, 1]
    assert store.trained(every, every * 0, store.lengths, "response").tolist() == [1, 0, 3, 1]
    assert store.trained(every, every * 0, store.lengths, "last_turn").tolist() == [0, 0, 2, 1]


def test_a_first_token_is_never_trained_and_the_turns_stay_as_they_are() -> None:
    turn = np.array([2, 1, 0, 2], dtype=np.uint8)
    assert is_trained(turn, "all").tolist() == [False, True, True, True]
    assert is_trained(turn, "response").tolist() == [False, True, False, True]
    assert is_trained(turn, "last_turn").tolist() == [False, False, False, True]
    assert turn.tolist() == [2, 1, 0, 2]


# Damage


def flip(at: float) -> Callable[[Path], None]:
    """Return a function that flips one bit of a file, at a fraction `at` of its length."""

    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * len(data))] ^= 0x40
        file.write_bytes(data)

    return damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = {
    "a flipped byte at the start": flip(0.0),
    "a flipped byte in the middle": flip(0.5),
    "a flipped byte near the end": flip(0.99),
    "truncated": truncate,
    "empty": empty,
    "missing": Path.unlink,
}


def assert_damaged(problem: pytest.ExceptionInfo[ClusterError], folder: Path, name: str) -> None:
    text = str(problem.value)
    assert f"{folder / name} is damaged or not readable" in text
    assert f"remove the folder {folder}, and the data will be tokenized again" in text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_when_it_is_read(tmp_path: Path, damage: str) -> None:
    store = write(tmp_path, *four_rows())
    DAMAGES[damage](tmp_path / "shard-00001.arrow")
    assert_same(store.row(1), four_rows()[0][1])  # the other shard is intact
    with pytest.raises(ClusterError) as problem:
        store.row(2)
    assert_damaged(problem, tmp_path, "shard-00001.arrow")
    with pytest.raises(ClusterError) as problem:
        store.trained(np.array([2]), np.array([0]), np.array([2]), "response")
    assert_damaged(problem, tmp_path, "shard-00001.arrow")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, *four_rows())
    DAMAGES[damage](tmp_path / "index.npy")
    with pytest.raises(ClusterError) as problem:
        TokenStore(tmp_path)
    assert_damaged(problem, tmp_path, "index.npy")


@pytest.mark.parametrize(
    "damage", [truncate, empty, Path.unlink, *(lambda f, t=t: f.write_text(t) for t in ("{}", "[]", "null"))]
)
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write(tmp_path, *four_rows())
    damage(tmp_path / MANIFEST)
    with pytest.raises(ClusterError) as problem:
        TokenStore(tmp_path)
    assert_damaged(problem, tmp_path, MANIFEST)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize(
    ("name", "kind"), [(MALFORMED, "malformed"), (EMPTY, "empty"), (PARTLY_EMPTY, "partly_empty")]
)
def test_a_damaged_list_of_rows_is_named(
    tmp_path: Path, name: str, kind: str, damage: Callable[[Path], None]
) -> None:
    left = [("a.jsonl, line 2", "why")]
    write_index(tmp_path, [write_shard(tmp_path, 0, [], left, left, left)], {})
    damage(tmp_path / name)
    with pytest.raises(ClusterError) as problem:
        getattr(TokenStore(tmp_path), kind)
    assert_damaged(problem, tmp_path, name)


def test_the_largest_token_is_known_without_reading_shards(tmp_path: Path) -> None:
    first, second = four_rows()
    first[1].tokens[0] = 2**32 - 1
    assert write(tmp_path, [], first, second).manifest["largest_token"] == 2**32 - 1
    assert write(tmp_path, [], second).manifest["largest_token"] == 3001
    assert write(tmp_path, [row(0, [])]).manifest["largest_token"] == -1
    assert write(tmp_path).manifest["largest_token"] == -1
