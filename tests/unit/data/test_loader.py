"""The stream of packs: the same for any number of workers, found by seeking, with labels inside documents.

Documents encode who they are: token k of document n is 1000 n + k + 1, so that a batch tells where each of
its tokens comes from.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.loader import Geometry, MicroBatch, PackLoader
from orchestrator.data.packing import Packs, best_fit, one_each
from orchestrator.data.store import Account, TokenStore, write_index, write_shard
from orchestrator.data.template import Document

MAX_LENGTH = 300
SEED = 11


def document(number: int, length: int) -> Document:
    tokens = np.arange(length, dtype=np.uint32) + 1000 * number + 1
    trained = np.arange(length) >= max(1, length // 3)
    return Document(tokens, trained)


def make_store(folder: Path, lengths: list[int]) -> TokenStore:
    documents = [document(number, length) for number, length in enumerate(lengths)]
    half = len(documents) // 2
    shards = [
        write_shard(folder, n, part, Account()) for n, part in enumerate((documents[:half], documents[half:]))
    ]
    write_index(folder, shards, {})
    return TokenStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    lengths = np.random.default_rng(5).integers(2, MAX_LENGTH + 1, 90).tolist()
    return make_store(tmp_path_factory.mktemp("store"), [*lengths, MAX_LENGTH, 1, 2])


@pytest.fixture(scope="module")
def packs(store: TokenStore) -> Packs:
    return best_fit(store.lengths, MAX_LENGTH, SEED)


def loader(
    store: TokenStore,
    packs: Packs,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 8,
    seed: int = SEED,
    shuffle: bool = True,
) -> PackLoader:
    geometry = Geometry(MAX_LENGTH, global_batch_size, micro_batch_size, data_parallel_size)
    return PackLoader(store, packs, geometry, seed, shuffle)


def step_batches(which: PackLoader, step: int, ranks: int, last: int | None = None) -> list[MicroBatch]:
    """Return all micro-batches of a step, rank after rank."""
    return [batch for rank in range(ranks) for batch in which.micro_batches(step, rank, last)]


def documents_of(batch: MicroBatch) -> list[int]:
    """Return which documents a batch holds, in order, from the tokens themselves."""
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)[:-1]]).astype(int)
    return [int(batch.input_ids[start]) // 1000 for start in starts if batch.input_ids[start]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_each_document_is_read_once_in_each_epoch(
    store: TokenStore, packs: Packs, ranks: int, micro_batch_size: int
) -> None:
    which = loader(store, packs, ranks, micro_batch_size)
    for epochs in (1, 2, 3):
        last = epochs * len(packs)
        seen = [
            number
            for step in range(which.steps(epochs))
            for batch in step_batches(which, step, ranks, last)
            for number in documents_of(batch)
        ]
        assert sorted(seen) == sorted(list(range(len(store))) * epochs)


def test_the_packs_of_a_step_depend_only_on_seed_and_global_batch(store: TokenStore, packs: Packs) -> None:
    steps = range(2 * len(packs) // 8)
    plain = loader(store, packs)
    for ranks, micro in [(1, 2), (2, 1), (2, 4), (4, 1), (8, 1)]:
        other = loader(store, packs, ranks, micro)
        for step in steps:
            assert other.pack_numbers(step) == plain.pack_numbers(step)
            held = sorted(n for batch in step_batches(other, step, ranks) for n in documents_of(batch))
            assert held == sorted(n for batch in step_batches(plain, step, 1) for n in documents_of(batch))
    assert [loader(store, packs, seed=12).pack_numbers(s) for s in steps] != [
        plain.pack_numbers(s) for s in steps
    ]


def test_another_global_batch_takes_the_same_stream_in_other_portions(
    store: TokenStore, packs: Packs
) -> None:
    by_8 = [pack for step in range(6) for pack in loader(store, packs).pack_numbers(step)]
    by_12 = [
        pack for step in range(4) for pack in loader(store, packs, global_batch_size=12).pack_numbers(step)
    ]
    assert by_8 == by_12


def test_epochs_are_whole_permutations_and_differ(store: TokenStore, packs: Packs) -> None:
    which = loader(store, packs, global_batch_size=7)  # steps that span the boundary between epochs
    count = len(packs)
    stream = [pack for step in range(-(-3 * count // 7)) for pack in which.pack_numbers(step)]
    epochs = [stream[count * n : count * (n + 1)] for n in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)  # type: ignore[type-var]
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffling_packs_keep_their_order(store: TokenStore, packs: Packs) -> None:
    which = loader(store, packs, shuffle=False)
    assert which.pack_numbers(0) + which.pack_numbers(1) == [n % len(packs) for n in range(16)]


def equal(first: MicroBatch, second: MicroBatch) -> bool:
    arrays = ("input_ids", "position_ids", "label_positions", "labels")
    return first.document_lengths == second.document_lengths and all(
        (getattr(first, name) == getattr(second, name)).all() for name in arrays
    )


def test_seeking_gives_the_batches_that_iterating_gives(store: TokenStore, packs: Packs) -> None:
    steps = 12
    iterating = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
    in_order = [step_batches(iterating, step, 2) for step in range(steps)]
    for step in (11, 3, 7, 0, 11):
        fresh = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
        for expected, found in zip(in_order[step], step_batches(fresh, step, 2), strict=True):
            assert equal(expected, found)


def test_seeking_far_reads_nothing_on_the_way(
    store: TokenStore, packs: Packs, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = loader(store, packs)
    read: list[int] = []
    original = store.document
    monkeypatch.setattr(store, "document", lambda number: read.append(number) or original(number))
    batches = step_batches(which, 10**6, 1)
    assert sorted(read) == sorted(number for batch in batches for number in documents_of(batch))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_trained_tokens_of_the_plan_are_the_labels_of_all_ranks(
    store: TokenStore, packs: Packs, ranks: int
) -> None:
    which = loader(store, packs, ranks, 2)
    last = 2 * len(packs)
    total = 0
    for step in range(which.steps(2.0)):
        labels = sum(batch.trained_tokens for batch in step_batches(which, step, ranks, last))
        assert which.trained_tokens(step, last) == labels
        total += labels
    assert total == 2 * int(store.trained.sum())


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 50), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]))
def test_batches_are_laid_out_document_by_document(
    store: TokenStore, packs: Packs, step: int, ranks: int, micro: int
) -> None:
    for batch in step_batches(loader(store, packs, ranks, micro), step, ranks):
        assert (
            len(batch.input_ids)
            == len(batch.position_ids)
            == sum(batch.document_lengths)
            == micro * MAX_LENGTH
        )
        at = tokens = squares = 0
        labels: list[int] = []
        for length in batch.document_lengths:
            ids = batch.input_ids[at : at + length]
            assert batch.position_ids[at : at + length].tolist() == list(range(length))
            if ids[0]:
                number = int(ids[0]) // 1000
                assert length == store.lengths[number]  # whole: neither cut nor joined to another
                assert ids.tolist() == store.document(number).tokens.tolist()
                labels += ids[store.document(number).trained].tolist()
                tokens += length
                squares += length * length
            else:
                assert not ids.any()
                assert length <= 128
            at += length
        assert batch.labels.tolist() == labels
        assert (batch.tokens, batch.square_tokens) == (tokens, squares)


def test_a_label_is_the_next_token_of_the_same_document(store: TokenStore, packs: Packs) -> None:
    which = loader(store, packs, micro_batch_size=4)
    checked = 0
    for step in range(which.steps(1.0)):
        for batch in step_batches(which, step, 1):
            assert (np.diff(batch.label_positions) > 0).all()
            assert (
                batch.input_ids[batch.label_positions] + 1 == batch.labels
            ).all()  # also: never from padding
            assert (batch.input_ids[batch.label_positions] // 1000 == batch.labels // 1000).all()
            assert (batch.position_ids[batch.label_positions] + 1 == (batch.labels - 1) % 1000).all()
            checked += len(batch.labels)
    assert checked >= store.trained.sum()


def test_each_pack_of_a_micro_batch_starts_at_a_multiple_of_max_length(
    store: TokenStore, packs: Packs
) -> None:
    which = loader(store, packs, micro_batch_size=2)
    batch = which.assemble([3, 5])
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)])
    assert MAX_LENGTH in starts
    assert documents_of(batch) == [*packs.members(3).tolist(), *packs.members(5).tolist()]


def test_an_empty_place_is_padding_and_trains_nothing(store: TokenStore, packs: Packs) -> None:
    batch = loader(store, packs, micro_batch_size=2).assemble([None, None])
    assert not batch.input_ids.any()
    assert batch.document_lengths == (128, 128, 44) * 2
    assert batch.trained_tokens == batch.tokens == batch.square_tokens == 0
    assert batch.labels.dtype == batch.label_positions.dtype == np.int64


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_last_partial_step_has_empty_places_and_every_rank_its_batches(
    store: TokenStore, packs: Packs, ranks: int
) -> None:
    which = loader(store, packs, ranks)
    last = 19  # two steps of 8, and 3 packs more
    assert which.pack_numbers(1, last) == which.pack_numbers(1)
    assert which.pack_numbers(2, last) == [*which.pack_numbers(2)[:3], *[None] * 5]
    for rank in range(ranks):
        assert len(list(which.micro_batches(2, rank, last))) == 8 // ranks
    held = [n for batch in step_batches(which, 2, ranks, last) for n in documents_of(batch)]
    numbers = [pack for pack in which.pack_numbers(2, last) if pack is not None]
    assert sorted(held) == sorted(np.concatenate([packs.members(pack) for pack in numbers]).tolist())
    assert which.trained_tokens(3, last) == 0


def test_steps_and_epochs(store: TokenStore, packs: Packs) -> None:
    which = loader(store, packs)
    count = len(packs)
    assert which.steps(1.0) == -(-count // 8)
    assert which.steps(3.0) == -(-3 * count // 8)
    assert which.steps(8.0) == count  # exactly, in spite of floating point
    assert which.steps(1e-9) == 1
    assert which.packs(0.5) == -(-count // 2)
    assert which.steps(8 / count) == 1
    assert which.epoch(0) == 0.0
    assert which.epoch(count) == pytest.approx(8.0)
    assert which.epoch(count, last=2 * count) == 2.0


def test_a_first_token_is_never_a_label_whatever_the_mask_says(tmp_path: Path) -> None:
    documents = [
        Document(np.arange(5, dtype=np.uint32) + 1000 * n + 1, np.ones(5, np.bool_)) for n in range(3)
    ]
    write_index(tmp_path, [write_shard(tmp_path, 0, documents, Account())], {})
    marked = TokenStore(tmp_path)
    which = loader(marked, best_fit(marked.lengths, MAX_LENGTH, 0), global_batch_size=1)
    (batch,) = which.micro_batches(0, 0)
    assert (batch.input_ids[batch.label_positions] + 1 == batch.labels).all()
    assert which.trained_tokens(0) == batch.trained_tokens == 3 * 4


def test_packing_none_gives_each_document_its_own_pack(store: TokenStore) -> None:
    which = loader(store, one_each(store.lengths))
    batch = which.assemble([4])
    assert documents_of(batch) == [4]
    assert batch.tokens == store.lengths[4]


def test_a_single_pack_repeats_in_every_place(tmp_path: Path) -> None:
    small = make_store(tmp_path, [5, 6])
    which = loader(small, best_fit(small.lengths, MAX_LENGTH, 0), data_parallel_size=2)
    assert which.pack_numbers(3) == [0] * 8
    assert which.trained_tokens(3) == 8 * int(small.trained.sum())


@pytest.mark.parametrize(("micro", "ranks", "expected"), [(1, 1, 8), (2, 1, 4), (2, 4, 1), (1, 8, 1)])
def test_micro_batches_of_a_worker(micro: int, ranks: int, expected: int) -> None:
    assert Geometry(MAX_LENGTH, 8, micro, ranks).micro_batches == expected
