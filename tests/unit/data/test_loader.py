"""PackLoader: the same packs for any number of ranks, random access to steps, labels within documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.balance import BatchShape
from orchestrator.data.corpus import Document
from orchestrator.data.loader import MicroBatch, PackLoader, SamplerConfig
from orchestrator.data.packing import Packs, best_fit, one_each
from tests.unit.data.listed import MAX_LENGTH, SEED, Listed, documents_of, loader, make, sample


@pytest.fixture(scope="module")
def store() -> Listed:
    return sample()


@pytest.fixture(scope="module")
def packs(store: Listed) -> Packs:
    return best_fit(store.lengths, MAX_LENGTH, SEED)


def step_batches(reader: PackLoader, step: int, ranks: int, last: int | None = None) -> list[MicroBatch]:
    """Return the micro-batches of all ranks in a step, ordered by rank."""
    return [batch for rank in range(ranks) for batch in reader.micro_batches(step, rank, last)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_each_document_is_read_once_in_each_epoch(
    store: Listed, packs: Packs, ranks: int, micro_batch_size: int
) -> None:
    reader = loader(store, packs, ranks, micro_batch_size)
    for epochs in (1, 2, 3):
        last = epochs * len(packs)
        seen = [
            number
            for step in range(reader.steps(epochs))
            for batch in step_batches(reader, step, ranks, last)
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


def test_zero_stage_changes_the_assignment_but_not_the_packs_of_a_step(store: Listed, packs: Packs) -> None:
    micro, step_sync = (loader(store, packs, 4, 1, sync_every_micro_step=sync) for sync in (True, False))
    for step in range(10):
        assert micro.pack_numbers(step) == step_sync.pack_numbers(step)


def test_cross_document_attention_makes_a_pack_one_document(store: Listed, packs: Packs) -> None:
    separate, joined = (
        loader(store, packs, cross_document_attention=across).assemble([0, 3]) for across in (False, True)
    )
    assert (separate.input_ids == joined.input_ids).all()
    assert (separate.labels == joined.labels).all()
    assert (separate.label_positions == joined.label_positions).all()
    sizes = [int(store.lengths[packs.members(number)].sum()) for number in (0, 3)]
    assert [size for size in joined.document_lengths if size > 128] == [size for size in sizes if size > 128]
    assert joined.square_tokens == sum(size**2 for size in sizes)
    assert joined.position_ids[: sizes[0]].tolist() == list(range(sizes[0]))
    assert joined.tokens == separate.tokens


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_concatenated_shards_equal_the_row(store: Listed, packs: Packs, shards: int, micro: int) -> None:
    whole = loader(store, packs, micro_batch_size=micro, global_batch_size=2)
    batch_shape = BatchShape(MAX_LENGTH, 2, micro, 1, sequence_parallel_size=shards)
    shared = PackLoader(store, packs, batch_shape, whole._sampler)
    for step in range(6):
        rows = [list(shared.micro_batches(step, 0, 11, shard)) for shard in range(shards)]
        for number, row in enumerate(whole.micro_batches(step, 0, 11)):
            held = [batches[number] for batches in rows]
            size = len(row.input_ids) // shards
            for name in ("input_ids", "position_ids", "labels"):
                assert np.concatenate([getattr(batch, name) for batch in held]).tolist() == (
                    getattr(row, name).tolist()
                )
            positions = [batch.label_positions + shard * size for shard, batch in enumerate(held)]
            assert np.concatenate(positions).tolist() == row.label_positions.tolist()
            assert all(
                ((batch.label_positions >= 0) & (batch.label_positions < size)).all() for batch in held
            )
            assert {batch.document_lengths for batch in held} == {row.document_lengths}
            assert sum(batch.tokens for batch in held) == row.tokens
            assert sum(batch.square_tokens for batch in held) == pytest.approx(row.square_tokens)


def test_a_shard_reads_only_its_documents(store: Listed, packs: Packs) -> None:
    batch_shape = BatchShape(MAX_LENGTH, 4, 4, 1, sequence_parallel_size=4)  # each shard is one pack
    shared = PackLoader(store, packs, batch_shape, SamplerConfig(SEED))
    for shard in range(4):
        store.read.clear()
        shared.assemble([0, 1, 2, 3], shard)
        assert sorted(store.read) == sorted(packs.members(shard).tolist())


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    before=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (8, 1)]),
    after=st.sampled_from([(1, 1), (1, 4), (2, 1), (4, 2), (8, 1)]),
    stop=st.integers(0, 16),
    window=st.sampled_from([1, 2, 32]),
    stages=st.tuples(st.booleans(), st.booleans()),
)
def test_resuming_with_another_world_size_reads_exactly_the_remaining_packs(
    count: int,
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
    window: int,
    stages: tuple[bool, bool],
) -> None:
    """Two epochs, stopped at any step and resumed with other ranks, read each document twice."""
    documents = make([MAX_LENGTH - 3 * (number % 50) for number in range(count)])
    packs = one_each(documents.lengths)
    first, second = (
        loader(documents, packs, *shape, balance_window_steps=window, sync_every_micro_step=sync)
        for shape, sync in zip((before, after), stages, strict=True)
    )
    last = first.packs(2.0)
    assert second.packs(2.0) == last
    steps = first.steps(2.0)
    seen: list[int] = []
    for step in range(steps):
        batches = step_batches(*((first, step, before[0]) if step < stop else (second, step, after[0])), last)
        seen += [number for batch in batches for number in documents_of(batch)]
    assert sorted(seen) == sorted(list(range(count)) * 2)
    alone = loader(documents, packs, balance_window_steps=window)
    for step in range(steps):
        assert alone.pack_numbers(step, last) == second.pack_numbers(step, last)


def test_each_epoch_is_a_different_permutation(store: Listed, packs: Packs) -> None:
    reader = loader(store, packs, global_batch_size=7)  # some steps span two epochs
    count = len(packs)
    stream = [pack for step in range(-(-3 * count // 7)) for pack in reader.pack_numbers(step)]
    epochs = [stream[count * n : count * (n + 1)] for n in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)  # type: ignore[type-var]
    assert epochs[0] != epochs[1] != epochs[2]


def test_shuffle_false_keeps_the_order_of_packs(store: Listed, packs: Packs) -> None:
    reader = loader(store, packs, shuffle=False)
    assert reader.pack_numbers(0) + reader.pack_numbers(1) == [n % len(packs) for n in range(16)]


def equal(first: MicroBatch, second: MicroBatch) -> bool:
    arrays = ("input_ids", "position_ids", "label_positions", "labels")
    return first.document_lengths == second.document_lengths and all(
        (getattr(first, name) == getattr(second, name)).all() for name in arrays
    )


def test_random_access_equals_iteration(store: Listed, packs: Packs) -> None:
    steps = 12
    iterating = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
    in_order = [step_batches(iterating, step, 2) for step in range(steps)]
    for step in (11, 3, 7, 0, 11):
        fresh = loader(store, packs, data_parallel_size=2, micro_batch_size=2)
        for expected, actual in zip(in_order[step], step_batches(fresh, step, 2), strict=True):
            assert equal(expected, actual)


def test_a_distant_step_reads_only_its_own_documents(store: Listed, packs: Packs) -> None:
    reader = loader(store, packs)
    store.read.clear()
    batches = step_batches(reader, 10**6, 1)
    assert sorted(store.read) == sorted(number for batch in batches for number in documents_of(batch))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_trained_tokens_equal_the_labels_of_all_ranks(store: Listed, packs: Packs, ranks: int) -> None:
    reader = loader(store, packs, ranks, 2)
    last = 2 * len(packs)
    total = 0
    for step in range(reader.steps(2.0)):
        labels = sum(batch.trained_tokens for batch in step_batches(reader, step, ranks, last))
        assert reader.trained_tokens(step, last) == labels
        total += labels
    assert total == 2 * int(store.trained.sum())


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 50), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]))
def test_layout_of_documents_padding_and_labels(
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
                assert length == store.lengths[number]  # neither truncated nor merged
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
    reader = loader(store, packs, micro_batch_size=4)
    checked = 0
    for step in range(reader.steps(1.0)):
        for batch in step_batches(reader, step, 1):
            assert (np.diff(batch.label_positions) > 0).all()
            # Token k of a document is followed by token k + 1; this fails for a label at a padding position.
            assert (batch.input_ids[batch.label_positions] + 1 == batch.labels).all()
            assert (batch.input_ids[batch.label_positions] // 1000 == batch.labels // 1000).all()
            assert (batch.position_ids[batch.label_positions] + 1 == (batch.labels - 1) % 1000).all()
            checked += len(batch.labels)
    assert checked >= store.trained.sum()


def test_each_pack_of_a_micro_batch_starts_at_a_multiple_of_max_length(store: Listed, packs: Packs) -> None:
    reader = loader(store, packs, micro_batch_size=2)
    batch = reader.assemble([3, 5])
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)])
    assert MAX_LENGTH in starts
    assert documents_of(batch) == [*packs.members(3).tolist(), *packs.members(5).tolist()]


def test_an_empty_slot_is_padding_without_labels(store: Listed, packs: Packs) -> None:
    batch = loader(store, packs, micro_batch_size=2).assemble([None, None])
    assert not batch.input_ids.any()
    assert batch.document_lengths == (128, 128, 44) * 2
    assert batch.trained_tokens == batch.tokens == batch.square_tokens == 0
    assert batch.labels.dtype == batch.label_positions.dtype == np.int64


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_all_micro_batches_in_the_last_partial_step(
    store: Listed, packs: Packs, ranks: int
) -> None:
    reader = loader(store, packs, ranks)
    last = 19  # two full steps of 8 packs and a partial step of 3
    assert reader.pack_numbers(1, last) == reader.pack_numbers(1)
    assert reader.pack_numbers(2, last) == [*reader.pack_numbers(2)[:3], *[None] * 5]
    for rank in range(ranks):
        assert len(list(reader.micro_batches(2, rank, last))) == 8 // ranks
    held = [n for batch in step_batches(reader, 2, ranks, last) for n in documents_of(batch)]
    numbers = [pack for pack in reader.pack_numbers(2, last) if pack is not None]
    assert sorted(held) == sorted(np.concatenate([packs.members(pack) for pack in numbers]).tolist())
    assert reader.trained_tokens(3, last) == 0


def test_steps_and_epochs(store: Listed, packs: Packs) -> None:
    reader = loader(store, packs)
    count = len(packs)
    assert reader.steps(1.0) == -(-count // 8)
    assert reader.steps(3.0) == -(-3 * count // 8)
    assert reader.steps(8.0) == count  # exact despite floating-point rounding
    assert reader.steps(1e-9) == 1
    assert reader.packs(0.5) == -(-count // 2)
    assert reader.steps(8 / count) == 1
    assert reader.epoch(0) == 0.0
    assert reader.epoch(count) == pytest.approx(8.0)
    assert reader.epoch(count, last=2 * count) == 2.0


def test_a_first_token_is_never_a_label_even_if_the_mask_selects_it() -> None:
    marked = Listed(
        [Document(np.arange(5, dtype=np.uint32) + 1000 * n + 1, np.ones(5, np.bool_)) for n in range(3)]
    )
    reader = loader(marked, best_fit(marked.lengths, MAX_LENGTH, 0), global_batch_size=1)
    (batch,) = reader.micro_batches(0, 0)
    assert (batch.input_ids[batch.label_positions] + 1 == batch.labels).all()
    assert reader.trained_tokens(0) == batch.trained_tokens == 3 * 4


def test_packing_none_gives_each_document_its_own_pack(store: Listed) -> None:
    reader = loader(store, one_each(store.lengths))
    batch = reader.assemble([4])
    assert documents_of(batch) == [4]
    assert batch.tokens == store.lengths[4]


def test_a_single_pack_fills_the_whole_global_batch() -> None:
    small = make([5, 6])
    reader = loader(small, best_fit(small.lengths, MAX_LENGTH, 0), data_parallel_size=2)
    assert reader.pack_numbers(3) == [0] * 8
    assert reader.trained_tokens(3) == 8 * int(small.trained.sum())


@pytest.mark.parametrize(("micro", "ranks", "expected"), [(1, 1, 8), (2, 1, 4), (2, 4, 1), (1, 8, 1)])
def test_gradient_accumulation_steps(micro: int, ranks: int, expected: int) -> None:
    assert BatchShape(MAX_LENGTH, 8, micro, ranks).gradient_accumulation_steps == expected
