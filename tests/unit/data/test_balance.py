"""Order and assignment of packs: each once per epoch, independent of world size, balanced across ranks."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.arch.flops import forward_flops
from orchestrator.arch.model_dims import ModelDims
from orchestrator.data.balance import BatchShape, assign_to_ranks, epoch_order, wait_factor
from orchestrator.data.packing import best_fit

LLAMA_2_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000)


def batch_shape(global_batch: int, micro: int, ranks: int, sync: bool = True) -> BatchShape:
    return BatchShape(100, global_batch, micro, ranks, sync)


@settings(max_examples=100, deadline=None)
@given(
    packs=st.integers(1, 300),
    batch=st.integers(1, 40),
    window=st.integers(1, 40),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_holds_every_pack_once(packs: int, batch: int, window: int, epoch: int, seed: int) -> None:
    costs = np.random.default_rng(seed).random(packs)
    order = epoch_order(costs, seed, epoch, batch, window)
    assert sorted(order.tolist()) == list(range(packs))
    assert (order == epoch_order(costs, seed, epoch, batch, window)).all()


def test_the_order_of_a_seed_never_changes() -> None:
    """The order is frozen: a run that resumes with a later version must read the same packs."""
    costs = (np.arange(24) * 7 % 24).astype(np.float64)
    assert epoch_order(costs, 1024, 0, 4, 1).tolist() == FROZEN_SHUFFLED
    assert epoch_order(costs, 1024, 1, 4, 3).tolist() == FROZEN_BALANCED


FROZEN_SHUFFLED = [0, 18, 14, 12, 8, 16, 13, 17, 3, 21, 1, 15, 4, 11, 23, 7, 9, 20, 22, 6, 5, 2, 19, 10]
FROZEN_BALANCED = [14, 18, 15, 22, 16, 13, 3, 17, 5, 12, 19, 2, 23, 6, 20, 10, 0, 7, 21, 4, 11, 1, 8, 9]


@pytest.mark.parametrize(("packs", "epoch"), list(product((640, 643), (0, 1, 2))))
def test_packs_of_similar_cost_share_a_step_even_across_an_epoch_boundary(packs: int, epoch: int) -> None:
    costs = np.random.default_rng(0).random(packs)
    stream = np.concatenate([epoch_order(costs, 5, number, 8, 16) for number in range(3)])
    first = -(-epoch * packs // 8)
    ranges = [
        np.ptp(costs[stream[8 * step : 8 * step + 8]]) for step in range(first, (epoch + 1) * packs // 8)
    ]
    assert np.median(ranges) < 0.1 < 0.7 < np.ptp(costs)


def test_steps_within_a_window_are_shuffled() -> None:
    costs = np.arange(320, dtype=np.float64)
    means = costs[epoch_order(costs, 1, 0, 10, 32)].reshape(32, 10).mean(axis=1)
    assert sorted(means.tolist()) != means.tolist()
    assert abs(np.corrcoef(means, np.arange(32))[0, 1]) < 0.5


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 8]),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    sync=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_pack_is_assigned_once(ranks: int, micro: int, accumulation: int, sync: bool, seed: int) -> None:
    batch = ranks * micro * accumulation
    costs = np.random.default_rng(seed).random((5, batch))
    assigned = assign_to_ranks(costs, batch_shape(batch, micro, ranks, sync))
    assert assigned.shape == (5, ranks, accumulation, micro)
    for step in assigned:
        assert sorted(step.ravel().tolist()) == list(range(batch))


def test_zero_3_balances_each_micro_step() -> None:
    costs = np.random.default_rng(1).random((1, 32))
    work = costs[0][assign_to_ranks(costs, batch_shape(32, 1, 4))[0]]  # [rank, micro-batch, 1]
    assert np.ptp(work, axis=0).max() < 0.25
    assert np.ptp(work) > 0.8


def test_zero_1_balances_the_whole_step() -> None:
    costs = np.random.default_rng(1).random((1, 32))
    work = costs[0][assign_to_ranks(costs, batch_shape(32, 1, 4, sync=False))[0]].sum(axis=(1, 2))
    assert np.ptp(work) / work.mean() < 0.03


@pytest.mark.parametrize(("sync", "expected"), [(True, (3 + 5) / (2 + 4.5)), (False, 7 / 6.5)])
def test_wait_factor_of_a_known_case(sync: bool, expected: float) -> None:
    costs = np.array([3.0, 1.0, 4.0, 5.0])  # micro-step 0 has 3 and 1, micro-step 1 has 4 and 5
    factor = wait_factor(costs, np.arange(4), batch_shape(4, 1, 2, sync), balanced=False)
    assert factor == pytest.approx(expected)


def test_wait_factor_is_one_for_one_rank_or_equal_packs() -> None:
    costs = np.random.default_rng(2).random(64)
    assert wait_factor(costs, np.arange(64), batch_shape(8, 1, 1), balanced=True) == 1.0
    assert wait_factor(np.ones(64), np.arange(64), batch_shape(8, 1, 4), balanced=True) == 1.0
    assert wait_factor(costs[:7], np.arange(7), batch_shape(8, 1, 4), balanced=True) == 1.0, "no full step"


def long_tailed(documents: int, capacity: int) -> np.ndarray:
    """Return pack costs of a 7B model for long-tailed documents, a few of which fill a pack."""
    drawn = np.random.default_rng(3).lognormal(6.3, 1.3, documents)
    lengths = np.clip(drawn, 10, capacity).astype(np.int64)
    packs = best_fit(lengths, capacity, 3)
    slot = forward_flops(LLAMA_2_7B, 1, 0, 0).linear
    square = forward_flops(LLAMA_2_7B, 0, 1, 0).attention
    return slot * capacity + square * packs.sums(lengths**2).astype(np.float64)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("sync", [True, False])
def test_64_ranks_at_32k_are_balanced_within_2_percent(sync: bool, accumulation: int) -> None:
    costs, step = long_tailed(300_000, 32768), batch_shape(64 * accumulation, 1, 64, sync)
    shuffled = epoch_order(costs, 1, 0, step.global_batch_size, 1)
    balanced = epoch_order(costs, 1, 0, step.global_batch_size, 32)
    before = wait_factor(costs, shuffled, step, balanced=False)
    assert before > (1.3 if sync or accumulation == 1 else 1.1)
    assert wait_factor(costs, balanced, step, balanced=True) <= 1.02
