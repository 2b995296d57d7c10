"""Packed datasets are reused for equal settings, and load returns the documents and packs that were saved."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, Encoded
from orchestrator.data.corpus import Corpus
from orchestrator.data.packed_dataset import get_or_create, load, make, save
from orchestrator.data.packing import Packs, best_fit
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.errors import ClusterError, SpecError

PACKINGS = ["none", "best_fit", "concat"]
LENGTHS = [5, 40, 16, 3, 9, 27, 12, 7, 20, 2]
SOURCE = SourceSpec(path="a.jsonl")


def store_of(folder: Path, lengths: Sequence[int], context: int = 1) -> TokenStore:
    """Write a store with rows of these lengths and distinct token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.append(0, np.cumsum(lengths))
    rows = [
        Encoded(
            np.arange(start, start + length, dtype=np.uint32),
            np.where(np.arange(length) < context, CONTEXT, LAST_RESPONSE).astype(np.uint8),
        )
        for start, length in zip(starts.tolist(), lengths, strict=False)
    ]
    half = len(rows) // 2
    write_index(folder, [write_shard(folder, 0, rows[:half]), write_shard(folder, 1, rows[half:])], {})
    return TokenStore(folder)


def data_of(**settings: Any) -> DataSpec:
    return DataSpec(train=(SOURCE,), **{"max_length": 16, **settings})


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return store_of(tmp_path / "store", LENGTHS)


def assert_same(actual: tuple[Corpus, Packs], expected: tuple[Corpus, Packs]) -> None:
    (corpus, packs), (other, other_packs) = actual, expected
    for name in ("store", "row", "start", "lengths", "trained"):
        assert getattr(corpus, name).dtype == getattr(other, name).dtype
        assert getattr(corpus, name).tolist() == getattr(other, name).tolist()
    assert corpus.source_counts == other.source_counts
    assert corpus.loss_on == other.loss_on
    assert [store.folder for store in corpus.stores] == [store.folder for store in other.stores]
    assert packs.documents.tolist() == other_packs.documents.tolist()
    assert packs.bounds.tolist() == other_packs.bounds.tolist()
    for number in range(len(corpus)):
        document, same = corpus.document(number), other.document(number)
        assert document.tokens.tolist() == same.tokens.tolist()
        assert document.trained.tolist() == same.trained.tolist()


# The folder


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("truncation", ["right", "split"])
def test_load_returns_what_was_saved(store: TokenStore, packing: str, truncation: str) -> None:
    data = data_of(packing=packing, truncation=truncation, loss_on="all")
    folder = get_or_create(store.folder.parent, [store], [SOURCE], data, 3)
    assert_same(load(folder), make([store], [SOURCE], data, 3))
    corpus, packs = load(folder)
    assert packs.sums(corpus.lengths).sum() == corpus.counts.tokens_kept
    with pytest.raises(ValueError, match="read-only"):
        packs.documents[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        corpus.lengths[0] = 1


def test_load_with_several_sources(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "a", LENGTHS), store_of(tmp_path / "b", [30, 4])]
    sources = [SourceSpec(path="a", sample=5), SourceSpec(path="b", repeat=3)]
    data = data_of()
    folder = get_or_create(tmp_path, stores, sources, data, 0)
    assert_same(load(folder), make(stores, sources, data, 0))
    corpus, _ = load(folder)
    assert [counts.rows for counts in corpus.source_counts] == [5, 6]


def test_an_existing_packed_dataset_is_reused(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = store.folder.parent, data_of()
    first = get_or_create(cache, [store], [SOURCE], data, 3)
    written = (first / "documents.npy").stat().st_mtime_ns

    def fail(*_: Any) -> Any:
        raise AssertionError("packed again")

    monkeypatch.setattr(packed_dataset, "make", fail)
    assert get_or_create(cache, [TokenStore(store.folder)], [SOURCE], data_of(), 3) == first
    # Settings that do not change the packs reuse it as well.
    elsewhere = SOURCE.model_copy(update={"path": "b.jsonl"})
    other = data_of(balance_window_steps=5, cross_document_attention=True, malformed_rows_allowed=1)
    assert get_or_create(cache, [store], [elsewhere], other, 3) == first
    assert (first / "documents.npy").stat().st_mtime_ns == written
    with pytest.raises(AssertionError, match="packed again"):
        get_or_create(cache, [store], [SOURCE], data, 4)


def test_each_relevant_setting_changes_the_folder(store: TokenStore) -> None:
    cache, data = store.folder.parent, data_of()
    same_rows = store_of(cache / "other", LENGTHS)
    folders = [
        get_or_create(cache, [store], [SOURCE], data, 3),
        get_or_create(cache, [store], [SOURCE], data, 4),
        get_or_create(cache, [same_rows], [SOURCE], data, 3),
        get_or_create(cache, [store, same_rows], [SOURCE, SOURCE], data, 3),
        get_or_create(cache, [same_rows, store], [SOURCE, SOURCE], data, 3),
        *(
            get_or_create(cache, [store], [SourceSpec(path="a.jsonl", **change)], data, 3)
            for change in ({"repeat": 2}, {"weight": 0.5}, {"sample": 4})
        ),
        *(
            get_or_create(cache, [store], [SOURCE], data_of(**change), 3)
            for change in (
                {"max_length": 17},
                {"packing": "none"},
                {"packing": "concat"},
                {"truncation": "left"},
                {"truncation": "split"},
                {"loss_on": "all"},
                {"loss_on": "last_turn"},
            )
        ),
    ]
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {cache}
    assert all((folder / "packed_dataset.json").exists() for folder in folders)


def test_a_packed_dataset_can_be_moved_with_its_stores(tmp_path: Path) -> None:
    store = store_of(tmp_path / "cache" / "store", LENGTHS)
    folder = get_or_create(tmp_path / "cache", [store], [SOURCE], data_of(packing="none"), 3)
    (tmp_path / "cache").rename(tmp_path / "moved")
    corpus, _ = load(tmp_path / "moved" / folder.name)
    assert corpus.stores[0].folder == tmp_path / "moved" / "store"
    assert corpus.document(0).tokens.tolist() == [0, 1, 2, 3, 4]


def test_save_keeps_an_existing_packed_dataset(store: TokenStore) -> None:
    made = make([store], [SOURCE], data_of(), 3)
    folder = store.folder.parent / "packed"
    save(folder, *made)
    corpus, packs = made
    save(folder, replace(corpus, trained=corpus.trained + 1), packs)
    assert_same(load(folder), made)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["packed", "store"]


def test_a_failed_save_leaves_no_files(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"cannot be written to .*/file .*; free some space") as problem:
        get_or_create(tmp_path / "file", [store], [SOURCE], data_of(), 3)
    assert "checkpoint.storage" in str(problem.value)
    cache = tmp_path / "cache"
    folder = get_or_create(cache, [store], [SOURCE], data_of(), 3)
    (folder / "packed_dataset.json").unlink()  # an incomplete folder of the same name
    with pytest.raises(ClusterError, match="cannot be written"):
        get_or_create(cache, [store], [SOURCE], data_of(), 3)
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_an_invalid_job_leaves_no_files(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="sample=11 is above its 10 rows"):
        get_or_create(tmp_path / "cache", [store], [SourceSpec(path="a", sample=11)], data_of(), 3)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["documents", "packs", "bounds"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_corrupted_array_is_reported(store: TokenStore, name: str, how: str) -> None:
    folder = get_or_create(store.folder.parent, [store], [SOURCE], data_of(), 3)
    file = folder / f"{name}.npy"
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, len(data) - 8)
    else:
        data[-3] ^= 0x10
        file.write_bytes(data)
    with pytest.raises(ClusterError) as problem:
        load(folder)
    assert f"packed dataset {folder} is damaged or not readable" in str(problem.value)
    assert f"{name}.npy" in str(problem.value)
    assert "remove that folder and it will be packed again" in str(problem.value)


@pytest.mark.parametrize("text", ["", '{"stores": [', "{}", "[]", "null", "\udcff"])
def test_a_corrupted_manifest_is_reported(store: TokenStore, text: str) -> None:
    folder = get_or_create(store.folder.parent, [store], [SOURCE], data_of(), 3)
    (folder / "packed_dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ClusterError, match="is damaged or not readable"):
        load(folder)


def test_a_missing_store_is_reported(store: TokenStore) -> None:
    folder = get_or_create(store.folder.parent, [store], [SOURCE], data_of(), 3)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(ClusterError, match=r"store/manifest\.json is damaged or not readable"):
        load(folder)


def test_the_manifest_has_token_counts(store: TokenStore) -> None:
    folder = get_or_create(store.folder.parent, [store], [SOURCE], data_of(), 3)
    manifest = json.loads((folder / "packed_dataset.json").read_text())
    assert manifest["stores"] == ["store"]
    (counts,) = manifest["source_counts"]
    assert counts["rows"] == 10
    assert counts["tokens_read"] == sum(LENGTHS)


# Packing


def test_packing_none_keeps_one_document_per_pack_in_order(store: TokenStore) -> None:
    corpus, packs = make([store], [SOURCE], data_of(packing="none"), 3)
    assert packs.documents.tolist() == list(range(10))
    assert packs.bounds.tolist() == list(range(11))
    assert corpus.lengths.tolist() == [min(length, 16) for length in LENGTHS]


def test_best_fit_packs_every_document_once_within_max_length(store: TokenStore) -> None:
    corpus, packs = make([store], [SOURCE], data_of(packing="best_fit"), 3)
    assert sorted(packs.documents.tolist()) == list(range(10))
    assert packs.sums(corpus.lengths).max() <= 16
    assert len(packs) < 10
    expected = best_fit(corpus.lengths, 16, 3)
    assert packs.documents.tolist() == expected.documents.tolist()
    assert packs.bounds.tolist() == expected.bounds.tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=20),
    st.integers(16, 40),
    st.sampled_from(["right", "split"]),
    st.integers(0, 2**32 - 1),
)
def test_concat_keeps_every_token_once_and_fills_all_packs_but_the_last(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, truncation: str, seed: int
) -> None:
    store = store_of(tmp_path_factory.mktemp("concat") / "store", lengths)
    data = data_of(packing="concat", truncation=truncation, max_length=limit, loss_on="all")
    whole, _ = make([store], [SOURCE], data.model_copy(update={"packing": "none"}), seed)
    corpus, packs = make([store], [SOURCE], data, seed)

    kept = [token for number in range(len(whole)) for token in whole.document(number).tokens.tolist()]
    pieces = [corpus.document(number) for number in range(len(corpus))]
    stream = [token for piece in pieces for token in piece.tokens.tolist()]
    assert sorted(stream) == sorted(kept)
    assert packs.documents.tolist() == list(range(len(corpus)))  # packs contain the pieces in order
    loads = packs.sums(corpus.lengths).tolist()
    assert all(load == limit for load in loads[:-1])
    assert 0 < loads[-1] <= limit
    assert corpus.lengths.min() > 0

    # The tokens of a document are contiguous in the stream, even if it is cut into pieces.
    at = {token: position for position, token in enumerate(stream)}
    for number in range(len(whole)):
        positions = [at[token] for token in whole.document(number).tokens.tolist()]
        assert positions == list(range(positions[0], positions[0] + len(positions)))

    for piece, length, trained in zip(pieces, corpus.lengths, corpus.trained, strict=True):
        assert len(piece.tokens) == length
        assert not piece.trained[0]
        assert piece.trained[1:].all()
        assert trained == length - 1
    counts = corpus.counts
    assert counts.documents == len(corpus)
    assert counts.tokens_kept == len(kept) == whole.counts.tokens_kept
    assert counts.trained_tokens == len(kept) - len(corpus)
    assert counts.rows_split <= counts.rows == len(lengths)


def test_concat_trains_on_answers_only(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [30, 30], context=20)
    corpus, packs = make([store], [SOURCE], data_of(packing="concat", max_length=32), 3)
    assert corpus.lengths.tolist() == [30, 2, 28]
    assert packs.bounds.tolist() == [0, 2, 3]
    assert corpus.trained.tolist() == [10, 0, 10]
    for number in range(3):
        assert corpus.document(number).trained.sum() == corpus.trained[number]
    assert corpus.counts.rows_split == 1


def test_the_seed_changes_only_the_order(store: TokenStore) -> None:
    for packing in ("best_fit", "concat"):
        data = data_of(packing=packing)
        first, same, other = (make([store], [SOURCE], data, seed) for seed in (1, 1, 2))
        assert_same(first, same)
        assert first[0].counts.tokens_kept == other[0].counts.tokens_kept
        orders = [
            [corpus.document(int(number)).tokens[0] for number in packs.documents]
            for corpus, packs in (first, other)
        ]
        assert orders[0] != orders[1]
