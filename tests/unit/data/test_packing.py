"""Packing: every document exactly once, no pack over capacity, and a pack count close to the optimum."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.packing import (
    Packs,
    _shuffle,
    best_fit,
    best_fit_decreasing,
    concat,
    lower_bound,
    one_each,
)

Lengths = npt.NDArray[np.int64]


@st.composite
def problems(draw: st.DrawFn, largest: int = 64, most: int = 120) -> tuple[Lengths, int]:
    """Draw a capacity and document lengths up to it, many of them equal."""
    capacity = draw(st.integers(1, largest))
    pool = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=8))
    drawn = draw(st.lists(st.one_of(st.integers(1, capacity), st.sampled_from(pool)), max_size=most))
    return np.array(drawn, dtype=np.int64), capacity


def loads(packs: Packs, lengths: Lengths) -> list[int]:
    return [int(lengths[packs.members(number)].sum()) for number in range(len(packs))]


def fewest(lengths: list[int], capacity: int) -> int:
    """Return the optimal number of packs by exhaustive search, skipping symmetric assignments."""
    best = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for room in set(rooms):
            if room >= lengths[index]:
                at = rooms.index(room)
                place(index + 1, [*rooms[:at], room - lengths[index], *rooms[at + 1 :]])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_packing_is_complete_and_within_capacity(problem: tuple[Lengths, int], seed: int) -> None:
    lengths, capacity = problem
    packs = best_fit(lengths, capacity, seed)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    assert packs.bounds[0] == 0
    assert packs.bounds[-1] == len(lengths)
    assert all(before < after for before, after in pairwise(packs.bounds.tolist()))  # no pack is empty
    assert all(load <= capacity for load in loads(packs, lengths))
    assert len(packs) >= lower_bound(lengths, capacity)
    again = best_fit(lengths, capacity, seed)
    assert (again.documents == packs.documents).all()
    assert (again.bounds == packs.bounds).all()


@settings(max_examples=150, deadline=None)
@given(problems(largest=20, most=8))
def test_the_lower_bound_is_one(problem: tuple[Lengths, int]) -> None:
    lengths, capacity = problem
    optimum = fewest(sorted(lengths.tolist(), reverse=True), capacity)
    assert lower_bound(lengths, capacity) <= optimum
    packed = len(best_fit(lengths, capacity, 0))
    assert optimum <= packed <= 1.5 * optimum  # proven worst-case ratio of best-fit-decreasing


@settings(max_examples=100, deadline=None)
@given(problems())
def test_each_document_goes_where_it_leaves_the_least_room(problem: tuple[Lengths, int]) -> None:
    """The histogram-based implementation fills packs like best-fit-decreasing document by document."""
    lengths, capacity = problem
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    packs = best_fit_decreasing(lengths, capacity, 1)
    assert sorted(capacity - load for load in loads(packs, lengths)) == sorted(rooms)


@pytest.mark.parametrize(
    ("lengths", "capacity", "bound"),
    [
        ([], 10, 0),
        ([10], 10, 1),
        ([6, 6, 6], 10, 3),  # two documents above half the capacity never share a pack
        ([5, 5, 5], 10, 2),
        ([7, 7, 4, 4], 10, 3),  # 7 + 4 exceeds the capacity
        ([7, 7, 3, 3], 10, 2),
        ([7, 7, 7, 4], 10, 4),
        ([9, 9, 9, 2, 2, 2], 10, 4),
        ([4] * 5, 11, 2),
        ([1] * 11, 10, 2),
    ],
)
def test_lower_bounds_by_hand(lengths: list[int], capacity: int, bound: int) -> None:
    assert lower_bound(np.array(lengths, dtype=np.int64), capacity) == bound


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_long_tailed_data_is_packed_within_a_quarter_of_a_percent(capacity: int) -> None:
    drawn = np.random.default_rng(7).lognormal(5.2, 0.9, 50_000)
    lengths = np.clip(drawn, 1, capacity).astype(np.int64)
    bound = lower_bound(lengths, capacity)
    packs = best_fit(lengths, capacity, 3)
    assert len(packs) <= max(bound * 1.0025, bound + 1)
    assert max(loads(packs, lengths)) <= capacity
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))


def test_the_seed_decides_who_stands_together_and_not_how_many_packs() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    first, second = best_fit(lengths, 512, 1), best_fit(lengths, 512, 2)
    assert len(first) == len(second) == lower_bound(lengths, 512)
    assert (first.documents != second.documents).any()


def spread(packs: Packs, lengths: Lengths) -> float:
    """Return the coefficient of variation of the packs' attention cost."""
    squares = packs.sums(lengths**2)
    return float(squares.std() / squares.mean())


@pytest.mark.parametrize("capacity", [8192, 32768, 262144])
def test_packs_are_random_samples_of_the_corpus(capacity: int) -> None:
    """Almost as few packs as best-fit-decreasing, which puts all long documents into the first packs."""
    drawn = np.random.default_rng(7).lognormal(5.0, 0.65, 100_000)
    lengths = np.clip(drawn, 10, 2000).astype(np.int64)
    packs, decreasing = best_fit(lengths, capacity, 3), best_fit_decreasing(lengths, capacity, 3)
    assert len(packs) <= 1.002 * len(decreasing)
    assert spread(packs, lengths) < 0.25 < 0.6 < spread(decreasing, lengths)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_concat_cuts_one_stream_at_every_capacity(problem: tuple[Lengths, int], seed: int) -> None:
    lengths, capacity = problem
    lengths = lengths * 3  # some documents are longer than a pack
    pieces, packs = concat(lengths, capacity, seed)
    assert loads(packs, pieces.length)[:-1] == [capacity] * max(0, len(packs) - 1)
    assert len(packs) == -(-int(lengths.sum()) // capacity)
    assert packs.documents.tolist() == list(range(len(pieces.length)))
    assert (pieces.length > 0).all()
    for document in range(len(lengths)):
        mine = pieces.document == document
        assert np.diff(np.flatnonzero(mine)).tolist() == [1] * (int(mine.sum()) - 1)  # consecutive pieces
        ends = pieces.start[mine] + pieces.length[mine]
        assert pieces.start[mine].tolist() == [0, *ends[:-1].tolist()]
        assert ends[-1] == lengths[document]


def test_concat_joins_in_an_order_that_the_seed_decides() -> None:
    lengths = np.arange(1, 200, dtype=np.int64)
    orders = [concat(lengths, 64, seed)[0].document.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_document_of_full_length_fills_a_pack() -> None:
    assert len(best_fit(np.array([16, 16, 1], dtype=np.int64), 16, 0)) == 3


def test_no_documents_make_no_packs() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert len(best_fit(none, 16, 0)) == 0
    assert len(one_each(none)) == 0


@pytest.mark.parametrize("wrong", [0, -3, 17])
def test_a_length_that_no_pack_can_hold_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.16"):
        best_fit(np.array([4, wrong], dtype=np.int64), 16, 0)


def test_one_each() -> None:
    packs = one_each(np.array([5, 3, 9], dtype=np.int64))
    assert [packs.members(number).tolist() for number in range(len(packs))] == [[0], [1], [2]]


@pytest.mark.parametrize("count", [70_000, 131_072, 1_000_003])
def test_a_large_shuffle_is_a_random_order(count: int) -> None:
    order = _shuffle(count, 5)
    assert (np.sort(order) == np.arange(count)).all()
    assert (order != _shuffle(count, 6)).mean() > 0.99
    assert np.abs(np.diff(order)).mean() / count == pytest.approx(1 / 3, rel=0.01)
    assert (np.diff(order) > 0).mean() == pytest.approx(0.5, abs=0.01)
    for period in (2, 3, 7, 64, 1000):  # packs of neighbours vary like random samples
        groups = (order % period)[: count // 11 * 11].reshape(-1, 11)
        assert groups.mean(axis=1).var() == pytest.approx(groups.var() / 11, rel=0.1)
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.02
