"""The order of packs and their places: every pack once, the same for all world sizes, and little waiting."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.arch.flops import forward_flops
from orchestrator.arch.model_dims import ModelShape
from orchestrator.data.balance import Geometry, deal, epoch_order, wait_factor
from orchestrator.data.packing import best_fit

LLAMA_2_7B = ModelShape(4096, 32, 32, 32, 128, 11008, 32000)


def geometry(global_batch: int, micro: int, workers: int, each: bool = True) -> Geometry:
    return Geometry(100, global_batch, micro, workers, each)


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


def test_the_order_of_a_seed_is_the_same_for_good() -> None:
    """These numbers may never change: a run that is resumed under a later version depends on them."""
    costs = (np.arange(24) * 7 % 24).astype(np.float64)
    assert epoch_order(costs, 1024, 0, 4, 1).tolist() == FROZEN_BY_CHANCE
    assert epoch_order(costs, 1024, 1, 4, 3).tolist() == FROZEN_BALANCED


FROZEN_BY_CHANCE = [0, 18, 14, 12, 8, 16, 13, 17, 3, 21, 1, 15, 4, 11, 23, 7, 9, 20, 22, 6, 5, 2, 19, 10]
FROZEN_BALANCED = [14, 18, 15, 22, 16, 13, 3, 17, 5, 12, 19, 2, 23, 6, 20, 10, 0, 7, 21, 4, 11, 1, 8, 9]


@pytest.mark.parametrize(("packs", "epoch"), list(product((640, 643), (0, 1, 2))))
def test_packs_of_like_cost_share_a_step_also_where_epochs_meet_inside_one(packs: int, epoch: int) -> None:
    costs = np.random.default_rng(0).random(packs)
    stream = np.concatenate([epoch_order(costs, 5, number, 8, 16) for number in range(3)])
    first = -(-epoch * packs // 8)
    ranges = [
        np.ptp(costs[stream[8 * step : 8 * step + 8]]) for step in range(first, (epoch + 1) * packs // 8)
    ]
    assert np.median(ranges) < 0.1 < 0.7 < np.ptp(costs)


def test_steps_of_a_window_come_in_random_order() -> None:
    costs = np.arange(320, dtype=np.float64)
    means = costs[epoch_order(costs, 1, 0, 10, 32)].reshape(32, 10).mean(axis=1)
    assert sorted(means.tolist()) != means.tolist()
    assert abs(np.corrcoef(means, np.arange(32))[0, 1]) < 0.5


@settings(max_examples=100, deadline=None)
@given(
    workers=st.sampled_from([1, 2, 3, 8]),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    each=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_pack_of_a_step_gets_one_place(
    workers: int, micro: int, accumulation: int, each: bool, seed: int
) -> None:
    batch = workers * micro * accumulation
    costs = np.random.default_rng(seed).random((5, batch))
    places = deal(costs, geometry(batch, micro, workers, each))
    assert places.shape == (5, workers, accumulation, micro)
    for step in places:
        assert sorted(step.ravel().tolist()) == list(range(batch))


def test_under_zero_3_each_micro_step_holds_packs_of_like_cost() -> None:
    costs = np.random.default_rng(1).random((1, 32))
    work = costs[0][deal(costs, geometry(32, 1, 4))[0]]  # [worker, micro-batch, 1]
    assert np.ptp(work, axis=0).max() < 0.25
    assert np.ptp(work) > 0.8


def test_otherwise_the_sums_over_the_step_are_alike() -> None:
    costs = np.random.default_rng(1).random((1, 32))
    work = costs[0][deal(costs, geometry(32, 1, 4, each=False))[0]].sum(axis=(1, 2))
    assert np.ptp(work) / work.mean() < 0.03


@pytest.mark.parametrize(("each", "expected"), [(True, (3 + 5) / (2 + 4.5)), (False, 7 / 6.5)])
def test_a_wait_factor_by_hand(each: bool, expected: float) -> None:
    costs = np.array([3.0, 1.0, 4.0, 5.0])  # micro-step 0 has 3 and 1, micro-step 1 has 4 and 5
    factor = wait_factor(costs, np.arange(4), geometry(4, 1, 2, each), dealt=False)
    assert factor == pytest.approx(expected)


def test_nobody_waits_alone_or_with_equal_packs() -> None:
    costs = np.random.default_rng(2).random(64)
    assert wait_factor(costs, np.arange(64), geometry(8, 1, 1), dealt=True) == 1.0
    assert wait_factor(np.ones(64), np.arange(64), geometry(8, 1, 4), dealt=True) == 1.0
    assert wait_factor(costs[:7], np.arange(7), geometry(8, 1, 4), dealt=True) == 1.0, "no whole step"


def long_tailed(documents: int, capacity: int) -> np.ndarray:
    """Return the pack costs of a 7B model on documents of which a few fill a pack."""
    drawn = np.random.default_rng(3).lognormal(6.3, 1.3, documents)
    lengths = np.clip(drawn, 10, capacity).astype(np.int64)
    packs = best_fit(lengths, capacity, 3)
    slot = forward_flops(LLAMA_2_7B, 1, 0, 0).linear
    square = forward_flops(LLAMA_2_7B, 0, 1, 0).attention
    return slot * capacity + square * packs.sums(lengths**2).astype(np.float64)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("each", [True, False])
def test_64_workers_at_32k_wait_for_one_another_next_to_nothing(each: bool, accumulation: int) -> None:
    costs, step = long_tailed(300_000, 32768), geometry(64 * accumulation, 1, 64, each)
    chance = epoch_order(costs, 1, 0, step.global_batch_size, 1)
    ordered = epoch_order(costs, 1, 0, step.global_batch_size, 32)
    before = wait_factor(costs, chance, step, dealt=False)
    assert before > (1.3 if each or accumulation == 1 else 1.1)
    assert wait_factor(costs, ordered, step, dealt=True) <= 1.02
