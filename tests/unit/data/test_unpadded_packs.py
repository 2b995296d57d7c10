"""Packs without padding: documents end to end, shards of a row, and the cost of a pack."""

from typing import Any

import numpy as np
import pytest

from orchestrator.data.balance import BatchShape
from orchestrator.data.loader import PackLoader, SamplerConfig
from orchestrator.data.packing import one_each
from tests.unit.data.listed import MAX_LENGTH, SEED, Listed, documents_of, loader, sample


@pytest.fixture(scope="module")
def store() -> Listed:
    return sample()


def unpadded(store: Listed, micro: int = 1, shards: int = 1, **sampler: Any) -> PackLoader:
    batch_shape = BatchShape(MAX_LENGTH, 2 * micro, micro, 1, sequence_parallel_size=shards, pads_packs=False)
    return PackLoader(store, one_each(store.lengths), batch_shape, SamplerConfig(SEED, **sampler))


@pytest.mark.parametrize("numbers", [[4], [4, 7], [7, None, 4], [0, 1, 2, 3, 4]])
def test_without_padding_documents_lie_end_to_end(store: Listed, numbers: list[int | None]) -> None:
    batch = unpadded(store).assemble(numbers)
    real = [number for number in numbers if number is not None]
    assert batch.document_lengths == batch.real_lengths == tuple(int(store.lengths[each]) for each in real)
    assert len(batch.input_ids) == batch.tokens == sum(batch.document_lengths)
    assert documents_of(batch) == real
    padded = loader(store, one_each(store.lengths)).assemble(numbers)
    assert batch.labels.tolist() == padded.labels.tolist()
    assert batch.square_tokens == padded.square_tokens
    assert (
        batch.input_ids[batch.label_positions].tolist() == padded.input_ids[padded.label_positions].tolist()
    )


@pytest.mark.parametrize("shards", [2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 2])
def test_shards_without_padding_equal_the_row(store: Listed, shards: int, micro: int) -> None:
    whole, shared = unpadded(store, micro), unpadded(store, micro, shards)
    for step in range(3):
        rows = [list(shared.micro_batches(step, 0, 11, shard)) for shard in range(shards)]
        for number, row in enumerate(whole.micro_batches(step, 0, 11)):
            held = [batches[number] for batches in rows]
            assert {len(batch.input_ids) for batch in held} == {-(-len(row.input_ids) // shards)}
            size = len(row.input_ids)
            ids, positions = (
                np.concatenate([getattr(batch, name) for batch in held])
                for name in ("input_ids", "position_ids")
            )
            assert ids[:size].tolist() == row.input_ids.tolist()
            assert positions[:size].tolist() == row.position_ids.tolist()
            assert not ids[size:].any()
            assert sum(batch.tokens for batch in held) == row.tokens
            assert np.concatenate([batch.labels for batch in held]).tolist() == row.labels.tolist()
            labelled = [batch.label_positions + at * len(batch.input_ids) for at, batch in enumerate(held)]
            assert np.concatenate(labelled).tolist() == row.label_positions.tolist()
            assert sum(held[0].document_lengths) == len(ids)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_an_empty_row_without_padding_has_a_slot_per_shard(store: Listed, shards: int) -> None:
    batch = unpadded(store, 2, shards).assemble([None, None])
    assert len(batch.input_ids) == 1
    assert batch.document_lengths == (shards,)
    assert batch.trained_tokens == batch.tokens == batch.square_tokens == 0


def test_padding_changes_what_a_pack_costs(store: Listed) -> None:
    options = {"slot_cost": 2.0, "squared_length_cost": 0.5}
    squares = 0.5 * store.lengths**2
    assert unpadded(store, **options).costs.tolist() == (2.0 * store.lengths + squares).tolist()
    padded = loader(store, one_each(store.lengths), **options)
    assert padded.costs.tolist() == (2.0 * MAX_LENGTH + squares).tolist()
