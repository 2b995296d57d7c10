"""The stream of packs: the same for any number of workers, found by seeking, with labels inside documents.

Documents encode who they are: token k of document n is 1000 n + k + 1, so that a batch tells where each of
its tokens comes from.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.balance import Geometry
from orchestrator.data.corpus import Document
from orchestrator.data.loader import MicroBatch, Order, PackLoader
from orchestrator.data.packing import Packs, best_fit, one_each

MAX_LENGTH = 300
SEED = 11


def document(number: int, length: int) -> Document:
    tokens = np.arange(length, dtype=np.uint32) + 1000 * number + 1
    trained = np.arange(length) >= max(1, length // 3)
    return Document(tokens, trained)


class Listed:
    """Documents that are held in a list."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.lengths = np.array([len(each.tokens) for each in documents], dtype=np.int64)
        self.trained = np.array([each.trained[1:].sum() for each in documents], dtype=np.int64)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, number: int) -> Document:
        self.read.append(number)
        return self.documents[number]


def make(lengths: list[int]) -> Listed:
    return Listed([document(number, length) for number, length in enumerate(lengths)])


@pytest.fixture(scope="module")
def store() -> Listed:
    lengths = np.random.default_rng(5).integers(2, MAX_LENGTH + 1, 90).tolist()
    return make([*lengths, MAX_LENGTH, 1, 2])


@pytest.fixture(scope="module")
def packs(store: Listed) -> Packs:
    return best_fit(store.lengths, MAX_LENGTH, SEED)


def loader(
    store: Listed,
    packs: Packs,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 8,
    seed: int = SEED,
    shuffle: bool = True,
    waits_each_micro_step: bool = True,
    **order: Any,
) -> PackLoader:
    geometry = Geometry(
        MAX_LENGTH, global_batch_size, micro_batch_size, data_parallel_size, waits_each_micro_step
    )
    how = {"window_steps": 4, "slot_cost": 1.0, "square_cost": 0.01, **order}
    return PackLoader(store, packs, geometry, Order(seed, shuffle, **how))


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
    store: Listed, packs: Packs, ranks: int, micro_batch_size: int
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


def test_the_packs_of_a_step_depend_only_on_seed_and_global_batch(store: Listed, packs: Packs) -> None:
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


def test_the_stage_of_zero_decides_places_and_not_packs(store: Listed, packs: Packs) -> None:
    each, once = (loader(store, packs, 4, 1, waits_each_micro_step=waits) for waits in (True, False))
    for step in range(10):
        assert each.pack_numbers(step) == once.pack_numbers(step)


def test_joined_packs_are_one_document(store: Listed, packs: Packs) -> None:
    apart, joined = (loader(store, packs, joined=joined).assemble([0, 3]) for joined in (False, True))
    assert (apart.input_ids == joined.input_ids).all()
    assert (apart.labels == joined.labels).all()
    assert (apart.label_positions == joined.label_positions).all()
    sizes = [int(store.lengths[packs.members(number)].sum()) for number in (0, 3)]
    assert [size for size in joined.document_lengths if size > 128] == [size for size in sizes if size > 128]
    assert joined.square_tokens == sum(size**2 for size in sizes)
    assert joined.position_ids[: sizes[0]].tolist() == list(range(sizes[0]))
    assert joined.tokens == apart.tokens


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_parts_of_a_row_are_the_row(store: Listed, packs: Packs, parts: int, micro: int) -> None:
    whole = loader(store, packs, micro_batch_size=micro, global_batch_size=2)
    geometry = Geometry(MAX_LENGTH, 2, micro, 1, sequence_parallel_size=parts)
    shared = PackLoader(store, packs, geometry, whole._how)
    for step in range(6):
        rows = [list(shared.micro_batches(step, 0, 11, part)) for part in range(parts)]
        for number, row in enumerate(whole.micro_batches(step, 0, 11)):
            held = [batches[number] for batches in rows]
            size = len(row.input_ids) // parts
            for name in ("input_ids", "position_ids", "labels"):
                assert np.concatenate([getattr(each, name) for each in held]).tolist() == (
                    getattr(row, name).tolist()
                )
            positions = [each.label_positions + part * size for part, each in enumerate(held)]
            assert np.concatenate(positions).tolist() == row.label_positions.tolist()
            assert all(((each.label_positions >= 0) & (each.label_positions < size)).all() for each in held)
            assert {each.document_lengths for each in held} == {row.document_lengths}
            assert sum(each.tokens for each in held) == row.tokens
            assert sum(each.square_tokens for each in held) == pytest.approx(row.square_tokens)


def test_of_a_row_that_is_shared_only_the_documents_of_a_part_are_read(store: Listed, packs: Packs) -> None:
    geometry = Geometry(MAX_LENGTH, 4, 4, 1, sequence_parallel_size=4)  # a part is a pack
    shared = PackLoader(store, packs, geometry, Order(SEED))
    for part in range(4):
        store.read.clear()
        shared.assemble([0, 1, 2, 3], part)
        assert sorted(store.read) == sorted(packs.members(part).tolist())


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    before=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (8, 1)]),
    after=st.sampled_from([(1, 1), (1, 4), (2, 1), (4, 2), (8, 1)]),
    stop=st.integers(0, 16),
    window=st.sampled_from([1, 2, 32]),
    stages=st.tuples(st.booleans(), st.booleans()),
)
def test_a_run_that_stops_anywhere_goes_on_with_exactly_the_remaining_packs(
    count: int,
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
    window: int,
    stages: tuple[bool, bool],
) -> None:
    """Two epochs, stopped after any step and gone on with another number of workers: each document twice."""
    documents = make([MAX_LENGTH - 3 * (number % 50) for number in range(count)])
    packs = one_each(documents.lengths)
    first, second = (
        loader(documents, packs, *shape, window_steps=window, waits_each_micro_step=waits)
        for shape, waits in zip((before, after), stages, strict=True)
    )
    last = first.packs(2.0)
    assert second.packs(2.0) == last
    steps = first.steps(2.0)
    seen: list[int] = []
    for step in range(steps):
        batches = step_batches(*((first, step, before[0]) if step < stop else (second, step, after[0])), last)
        seen += [number for batch in batches for number in documents_of(batch)]
    assert sorted(seen) == sorted(list(range(count)) * 2)
    alone = loader(documents, packs, window_steps=window)
    for step in range(steps):
        assert alone.pack_numbers(step, last) == second.pack_numbers(step, last)


def test_epochs_are_whole_permutations_and_differ(store: Listed, packs: Packs) -> None:
    which = loader(store, packs, global_batch_size=7)  # steps that span the boundary between epochs
    count = len(packs)
    stream = [pack for step in range(-(-3 * count // 7)) for pack in which.pack_numbers(step)]
    epochs = [stream[count * n : count * (n + 1)] for n in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)  # type: ignore[type-var]
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffling_packs_keep_their_order(store: Listed, packs: Packs) -> None:
    which = loader(store, packs, shuffle=False)
    assert which.pack_numbers(0) + which.pack_numbers(1) == [n % len(packs) for n in range(16)]


def equal(first: MicroBatch, second: MicroBatch) -> bool:
    arrays = ("input_ids", "position_ids", "label_positions", "labels")
    return first.document_lengths == second.document_lengths and all(
        (getattr(first, name) == getattr(second, name)).all() for name in arrays
    )


def test_seeking_gives_the_batches_that_iterating_gives(store: Listed, packs: Packs) -> None:
    steps = 12
    iterating = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
    in_order = [step_batches(iterating, step, 2) for step in range(steps)]
    for step in (11, 3, 7, 0, 11):
        fresh = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
        for expected, found in zip(in_order[step], step_batches(fresh, step, 2), strict=True):
            assert equal(expected, found)


def test_seeking_far_reads_nothing_on_the_way(store: Listed, packs: Packs) -> None:
    which = loader(store, packs)
    store.read.clear()
    batches = step_batches(which, 10**6, 1)
    assert sorted(store.read) == sorted(number for batch in batches for number in documents_of(batch))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_trained_tokens_of_the_plan_are_the_labels_of_all_ranks(
    store: Listed, packs: Packs, ranks: int
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
    store: Listed, packs: Packs, step: int, ranks: int, micro: int
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


def test_a_label_is_the_next_token_of_the_same_document(store: Listed, packs: Packs) -> None:
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


def test_each_pack_of_a_micro_batch_starts_at_a_multiple_of_max_length(store: Listed, packs: Packs) -> None:
    which = loader(store, packs, micro_batch_size=2)
    batch = which.assemble([3, 5])
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)])
    assert MAX_LENGTH in starts
    assert documents_of(batch) == [*packs.members(3).tolist(), *packs.members(5).tolist()]


def test_an_empty_place_is_padding_and_trains_nothing(store: Listed, packs: Packs) -> None:
    batch = loader(store, packs, micro_batch_size=2).assemble([None, None])
    assert not batch.input_ids.any()
    assert batch.document_lengths == (128, 128, 44) * 2
    assert batch.trained_tokens == batch.tokens == batch.square_tokens == 0
    assert batch.labels.dtype == batch.label_positions.dtype == np.int64


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_last_partial_step_has_empty_places_and_every_rank_its_batches(
    store: Listed, packs: Packs, ranks: int
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


def test_steps_and_epochs(store: Listed, packs: Packs) -> None:
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


def test_a_first_token_is_never_a_label_whatever_the_mask_says() -> None:
    marked = Listed(
        [Document(np.arange(5, dtype=np.uint32) + 1000 * n + 1, np.ones(5, np.bool_)) for n in range(3)]
    )
    which = loader(marked, best_fit(marked.lengths, MAX_LENGTH, 0), global_batch_size=1)
    (batch,) = which.micro_batches(0, 0)
    assert (batch.input_ids[batch.label_positions] + 1 == batch.labels).all()
    assert which.trained_tokens(0) == batch.trained_tokens == 3 * 4


def test_packing_none_gives_each_document_its_own_pack(store: Listed) -> None:
    which = loader(store, one_each(store.lengths))
    batch = which.assemble([4])
    assert documents_of(batch) == [4]
    assert batch.tokens == store.lengths[4]


def test_a_single_pack_repeats_in_every_place() -> None:
    small = make([5, 6])
    which = loader(small, best_fit(small.lengths, MAX_LENGTH, 0), data_parallel_size=2)
    assert which.pack_numbers(3) == [0] * 8
    assert which.trained_tokens(3) == 8 * int(small.trained.sum())


@pytest.mark.parametrize(("micro", "ranks", "expected"), [(1, 1, 8), (2, 1, 4), (2, 4, 1), (1, 8, 1)])
def test_micro_batches_of_a_worker(micro: int, ranks: int, expected: int) -> None:
    assert Geometry(MAX_LENGTH, 8, micro, ranks).micro_batches == expected
