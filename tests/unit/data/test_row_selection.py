"""Duplicates are found and left out; held-out rows are chosen by their content and are never trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.chat_template import LAST_RESPONSE, Encoded
from orchestrator.data.corpus import Corpus
from orchestrator.data.packed_dataset import get_or_create, load, make
from orchestrator.data.row_selection import Selection, Split, count_equal, select_rows
from orchestrator.data.token_cache import TokenStore, row_hash, write_index, write_shard
from orchestrator.errors import SpecError


def encoded(content: int, length: int = 3) -> Encoded:
    """Return a row whose tokens are determined by `content`."""
    turn = np.full(length, LAST_RESPONSE, np.uint8)
    turn[0] = 0
    return Encoded(np.full(length, content, np.uint32), turn)


def store_of(folder: Path, contents: Sequence[int], shards: int = 1) -> TokenStore:
    folder.mkdir(parents=True)
    rows = [encoded(content) for content in contents]
    parts = [rows[number::shards] for number in range(shards)]
    write_index(folder, [write_shard(folder, at, part) for at, part in enumerate(parts)], {})
    return TokenStore(folder)


def source(path: str = "a.jsonl", **changes: Any) -> SourceSpec:
    return SourceSpec(path=path, **changes)


def contents(store: TokenStore, selection: Selection) -> list[int]:
    return [int(store.row(int(row)).tokens[0]) for row in selection.rows]


def read(store: TokenStore, share: float, held_out: bool, seed: int = 7, **changes: Any) -> list[int]:
    """Return the contents of the rows that an epoch reads of a source."""
    (selection,) = select_rows([store], [source(**changes)], seed, Split(share, held_out))
    return contents(store, selection)


# Hashes


def test_rows_have_equal_hashes_if_tokens_and_labels_are_equal(tmp_path: Path) -> None:
    row, other = encoded(5), encoded(5)
    other.turn[1] = 1
    assert row_hash(row) == row_hash(encoded(5))
    different = {row_hash(each) for each in (row, other, encoded(6), encoded(5, 2), encoded(5, 4))}
    assert len(different) == 5
    store = store_of(tmp_path / "store", [5, 6, 5], shards=2)
    assert store.hashes.tolist() == [row_hash(encoded(content)) for content in (5, 5, 6)]


# Duplicates


def test_duplicates_are_counted_in_the_source_of_the_later_row(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "a", [1, 2, 1]), store_of(tmp_path / "b", [2, 3, 3, 1, 4])]
    sources = [source("a"), source("b")]
    selections = select_rows(stores, sources, 0)
    assert [each.duplicate for each in selections] == [1, 3]
    assert [contents(*pair) for pair in zip(stores, selections, strict=True)] == [[1, 2, 1], [2, 3, 3, 1, 4]]
    selections = select_rows(stores, sources, 0, deduplicate=True)
    assert [each.duplicate for each in selections] == [1, 3]
    assert [contents(*pair) for pair in zip(stores, selections, strict=True)] == [[1, 2], [3, 4]]


def test_a_sample_is_drawn_from_the_rows_that_are_left(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [1, 2, 1, 3, 3])
    (selection,) = select_rows([store], [source(sample=3, repeat=2)], 0, deduplicate=True)
    assert contents(store, selection) == [1, 2, 3, 1, 2, 3]
    with pytest.raises(SpecError, match=r"sample=4 is above its 3 rows \(and 2 that equal an earlier row\)"):
        select_rows([store], [source(sample=4)], 0, deduplicate=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), max_size=20))
def test_equal_rows_of_two_sources_are_counted(first: list[int], second: list[int]) -> None:
    hashes = [np.array([row_hash(encoded(each)) for each in some], np.uint64) for some in (first, second)]
    assert count_equal(*hashes) == sum(content in second for content in first)


# Held-out rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda rows: len(set(rows)) > 1),
    st.floats(0.001, 0.999),
    st.integers(0, 2**32 - 1),
)
def test_every_row_is_on_one_side_with_all_its_duplicates(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    store = store_of(folder / "a", rows)
    training, held_out = (read(store, share, side, seed) for side in (False, True))
    assert sorted(training + held_out) == sorted(rows)
    assert training
    assert held_out
    assert not set(training) & set(held_out)
    # Neither the order of rows nor that of sources matters.
    again = store_of(folder / "b", rows[::-1], shards=3)
    assert sorted(read(again, share, True, seed)) == sorted(held_out)
    halves = [store_of(folder / "c", rows[1::2]), store_of(folder / "d", rows[::2])]
    selections = select_rows(halves, [source("c"), source("d")], seed, Split(share, True))
    both = [contents(*pair) for pair in zip(halves, selections, strict=True)]
    assert sorted(both[0] + both[1]) == sorted(held_out)


def test_the_share_is_about_what_was_asked_for_and_depends_on_the_seed(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", range(4000))
    for share in (0.02, 0.5, 0.9):
        assert len(read(store, share, True)) == pytest.approx(4000 * share, abs=4 * (4000 * share) ** 0.5)
    assert read(store, 0.5, True, 1) != read(store, 0.5, True, 2)
    smaller, larger = (set(read(store, share, True)) for share in (0.02, 0.1))
    assert smaller < larger


def test_rows_keep_their_side_when_rows_are_appended(tmp_path: Path) -> None:
    before, after = store_of(tmp_path / "a", range(300)), store_of(tmp_path / "b", range(500))
    held_out = read(after, 0.1, True)
    assert read(before, 0.1, True) == [content for content in held_out if content < 300]


def test_repeat_and_weight_are_of_training_and_a_sample_is_shared(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", range(200))
    changes: dict[str, Any] = {"sample": 100, "repeat": 2, "weight": 1.25}
    training, held_out = (read(store, 0.2, side, **changes) for side in (False, True))
    assert len(held_out) == len(set(held_out))
    assert len(set(training)) + len(held_out) == 100
    assert not set(training) & set(held_out)
    assert len(training) == round(2.5 * (100 - len(held_out)))


def test_one_row_is_held_out_of_few(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", range(3))
    assert [len(read(store, 0.001, side)) for side in (False, True)] == [2, 1]
    assert [len(read(store, 0.999, side)) for side in (False, True)] == [1, 2]


@pytest.mark.parametrize("rows", [[1], [1, 1, 1]])
def test_rows_that_cannot_be_split_are_one_error(tmp_path: Path, rows: list[int]) -> None:
    store = store_of(tmp_path / "a", rows)
    with pytest.raises(SpecError) as problem:
        read(store, 0.5, False)
    (sentence,) = problem.value.problems
    assert sentence.startswith("eval.share=0.5 cannot hold out rows of data.train: equal rows stay on the")
    assert f"and its {len(rows)} rows are all equal; add rows" in sentence


# In packed datasets


def data_of(**changes: Any) -> DataSpec:
    return DataSpec(train=(source(),), **{"max_length": 16, **changes})


def test_the_counts_of_both_sides_agree(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [*range(50), *range(10)])

    def corpus(split: Split, **changes: Any) -> Corpus:
        return make([store], [source()], data_of(**changes), 7, split)[0]

    training, held_out = (corpus(Split(0.3, side)).counts for side in (False, True))
    assert training.rows_held_out == held_out.rows_held_out == held_out.rows > 0
    assert training.rows + held_out.rows == training.rows_in_files == 60
    assert training.rows_duplicate == 10
    once = corpus(Split(0.3), deduplicate=True).counts
    assert (once.rows + once.rows_held_out, once.rows_duplicate) == (50, 10)
    whole = corpus(Split()).counts
    assert (whole.rows, whole.rows_held_out, whole.rows_duplicate) == (60, 0, 10)


@pytest.mark.parametrize("packing", ["none", "best_fit", "concat"])
def test_each_part_is_a_packed_dataset_of_its_own(tmp_path: Path, packing: str) -> None:
    store = store_of(tmp_path / "cache" / "a", range(40))
    data = data_of(packing=packing)
    folders = {
        get_or_create(tmp_path / "cache", [store], [source()], changed, 7, split)
        for changed in (data, data.model_copy(update={"deduplicate": True}))
        for split in (Split(), Split(0.2), Split(0.2, True), Split(0.3))
    }
    assert len(folders) == 8
    folder = get_or_create(tmp_path / "cache", [store], [source()], data, 7, Split(0.2, True))
    corpus, _ = load(folder)
    tokens = {int(corpus.document(number).tokens[0]) for number in range(len(corpus))}
    assert tokens == set(read(store, 0.2, True))
