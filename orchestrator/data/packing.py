"""Packing documents into packs of equal capacity, over the whole corpus at once and by number only.

Best fit in two movements. First the corpus is shuffled and dealt into packs, each up to a mark somewhat below
its capacity, so that packs are random samples of the corpus and cost alike. Then what was held back is packed
best-fit-decreasing on a length histogram: after a document of length l is put into the fullest pack that
still takes it, that pack is again the fullest one that may take the next of the same length, so a pack of
room r takes floor(r / l) of them at once, and the work grows with the number of distinct lengths and not with
the number of documents.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
# Room that dealing leaves in a pack, in mean documents: enough to be filled exactly, little enough to be
# random.
_ROOM_IN_DOCUMENTS = 3
_NUMBERS_AT_ONCE = 2**16  # of a shuffle: what stays in a processor's cache
_FEW_BITS = 16  # up to here numpy's own shuffle takes less than a millisecond
_ENOUGH = 1.002  # of the lower bound: random composition is worth that much


@dataclass(frozen=True)
class Packs:
    """Which documents stand in which pack.

    Attributes:
        documents: Document numbers, pack after pack, int64, shape [number of documents].
        bounds: Where each pack begins in `documents`, and the end of the last, int64, shape [packs + 1].
    """

    documents: Int64Array
    bounds: Int64Array

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, pack: int) -> Int64Array:
        """Return the document numbers of one pack, in the order in which they stand in it."""
        return self.documents[self.bounds[pack] : self.bounds[pack + 1]]

    def sums(self, values: npt.NDArray[np.int64]) -> Int64Array:
        """Return for each pack the sum of its documents' values, shape [packs]."""
        totals = np.concatenate([[0], np.cumsum(values[self.documents], dtype=np.int64)])
        sums: Int64Array = totals[self.bounds[1:]] - totals[self.bounds[:-1]]
        return sums


def one_each(lengths: Int64Array) -> Packs:
    """Return a pack for every document: what `packing: none` means."""
    count = len(lengths)
    return Packs(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, in the order in which they follow one another.

    Attributes:
        document: Which document each is a part of, int64, shape [pieces].
        start: Its first token in that document, int64, shape [pieces].
        length: Its tokens, int64, shape [pieces].
    """

    document: Int64Array
    start: Int64Array
    length: Int64Array


def concat(lengths: Int64Array, capacity: int, seed: int) -> tuple[Pieces, Packs]:
    """Join all documents in random order and cut the stream at every multiple of the capacity.

    Args:
        lengths: Tokens of each document, at least 1, shape [documents].
        capacity: Tokens in a pack; only the last holds fewer.
        seed: Decides the order.

    Returns:
        The pieces between joints and cuts, and packs of pieces.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    borders = np.union1d(ends, np.append(np.arange(capacity, total, capacity), total)) if total else ends
    starts = np.concatenate([[0], borders[:-1]]).astype(np.int64) if total else borders
    owner = np.searchsorted(ends, starts, side="right")
    begun = ends[owner] - lengths[order][owner]
    pieces = Pieces(order[owner].astype(np.int64), starts - begun, borders - starts)
    cuts = np.arange(0, total, capacity)
    bounds = np.append(np.searchsorted(starts, cuts), len(starts)).astype(np.int64)
    return pieces, Packs(np.arange(len(starts), dtype=np.int64), bounds)


def best_fit(lengths: Int64Array, capacity: int, seed: int) -> Packs:
    """Pack whole documents of all lengths together.

    Args:
        lengths: Tokens of each document, all between 1 and `capacity`, shape [documents].
        capacity: Tokens in a pack.
        seed: Decides the composition of packs.

    Returns:
        Packs that hold every document exactly once.

    Raises:
        ValueError: A length is outside 1..capacity.
    """
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"document lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity}")
    mark = capacity - int(_ROOM_IN_DOCUMENTS * lengths.mean())
    if mark < capacity // 2:  # packs of a few documents: how they fit together leaves nothing to chance
        return best_fit_decreasing(lengths, capacity, seed)
    dealt = _pack(lengths, capacity, mark, seed)
    if len(dealt) <= _ENOUGH * lower_bound(lengths, capacity):
        return dealt
    decreasing = best_fit_decreasing(lengths, capacity, seed)
    return dealt if len(dealt) <= len(decreasing) else decreasing


def best_fit_decreasing(lengths: Int64Array, capacity: int, seed: int) -> Packs:
    """Pack documents longest first, each where it leaves the least room; like `best_fit` otherwise."""
    return _pack(lengths, capacity, capacity, seed)


def _pack(lengths: Int64Array, capacity: int, mark: int, seed: int) -> Packs:
    """Deal documents up to a mark and pack the rest best-fit-decreasing; mark = capacity deals none."""
    order = _shuffle(len(lengths), seed)
    shuffled = lengths.astype(np.uint16 if capacity < 2**16 else np.uint32)[order]
    dealt = _deal(shuffled, capacity, mark)
    rooms = _Rooms.of(capacity, capacity - dealt.loads)
    rest = np.append(dealt.held, np.arange(dealt.count, len(order)))
    by_length, packs, ranks = _fill(rooms, shuffled[rest])
    first = np.zeros(rooms.opened, np.int64)
    first[: len(dealt.sizes)] = dealt.sizes
    bounds = np.append(0, np.cumsum(first + np.bincount(packs, minlength=rooms.opened)))
    documents = np.empty(len(order), np.int64)
    places = (bounds[:-1] + first)[packs] + ranks
    documents[places] = order[rest[by_length]]
    left = np.ones(len(order), np.bool_)
    left[places] = False
    documents[left] = np.delete(order[: dealt.count], dealt.held)
    return Packs(documents, bounds)


def _shuffle(count: int, seed: int) -> Int64Array:
    """Return the numbers below `count` in random order, three times as fast as numpy where there are many.

    Multiplying by odd numbers and folding the upper half of the bits into the lower one map the numbers of k
    bits onto themselves, in an order without a pattern (the finaliser of MurmurHash3, made for k bits).
    """
    generator = np.random.default_rng(seed)
    bits = count.bit_length()
    if bits <= _FEW_BITS or bits > 32:
        return generator.permutation(count)
    factors = generator.integers(0, 2**31, 3, dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    order = np.empty(count, np.int64)
    at = 0
    for first in range(0, 1 << bits, _NUMBERS_AT_ONCE):
        numbers = np.arange(first, first + _NUMBERS_AT_ONCE, dtype=np.uint32)
        for factor in factors:
            numbers *= factor | np.uint32(1)
            numbers += factor >> np.uint32(3)
            numbers &= mask
            numbers ^= numbers >> np.uint32(bits // 2)
        numbers = numbers[numbers < count]
        order[at : at + len(numbers)] = numbers
        at += len(numbers)
    return order


@dataclass(frozen=True)
class _Dealt:
    """The beginning of a stream of documents, cut into the beginnings of packs.

    Attributes:
        count: Documents of the stream that were looked at.
        held: Which of them were held back, ascending.
        sizes: Documents in each pack, shape [packs].
        loads: Tokens in each pack, shape [packs].
    """

    count: int
    held: Int64Array
    sizes: Int64Array
    loads: Int64Array


def _deal(lengths: npt.NDArray[Any], capacity: int, mark: int) -> _Dealt:
    """Cut a stream of documents into windows of `mark` tokens, each the beginning of a pack.

    A document belongs to the window in which it begins. The last one stands out of its window; where it
    stands out of the pack, it is held back.
    """
    nothing = np.zeros(0, np.int64)
    if mark >= capacity:
        return _Dealt(0, nothing, nothing, nothing)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1])
    lasts = np.searchsorted(ends, np.arange(1, total // mark + 1) * mark)
    lasts = lasts[np.diff(lasts, prepend=-1) > 0]  # a document may be longer than a window
    firsts = np.append(0, lasts + 1)[:-1]
    loads = ends[lasts] - ends[firsts] + lengths[firsts]
    over = loads > capacity
    # Tokens that will not go into what is left of any pack, and so open packs of their own.
    alone = int(lengths[lasts[over & (lengths[lasts] > 2 * (capacity - mark))]].sum())
    packs = min(len(lasts), -(-(total - alone) // capacity))
    if packs == 0:
        return _Dealt(0, nothing, nothing, nothing)
    lasts, firsts, loads, over = lasts[:packs], firsts[:packs], loads[:packs], over[:packs]
    held = lasts[over]
    loads[over] -= lengths[held]
    return _Dealt(int(lasts[-1]) + 1, held, lasts - firsts + 1 - over, loads)


@dataclass
class _Rooms:
    """Packs by the room that is left in them."""

    capacity: int
    opened: int = 0
    ascending: list[int] = field(default_factory=list)
    packs_with: dict[int, Int64Array] = field(default_factory=dict)

    @classmethod
    def of(cls, capacity: int, rooms: Int64Array) -> _Rooms:
        """Return packs that have a room each."""
        self = cls(capacity, opened=len(rooms))
        order = np.argsort(rooms, kind="stable")
        self.ascending = np.unique(rooms[rooms > 0]).tolist()
        parts = np.split(order, np.searchsorted(rooms[order], [*self.ascending, capacity + 1]))[1:-1]
        self.packs_with = dict(zip(self.ascending, parts, strict=True))
        return self

    def put_back(self, room: int, packs: Int64Array) -> None:
        """Keep packs with a room for later documents."""
        if room == 0 or len(packs) == 0:
            return
        if room in self.packs_with:
            self.packs_with[room] = np.concatenate([self.packs_with[room], packs])
        else:
            self.packs_with[room] = packs
            bisect.insort(self.ascending, room)

    def take(self, length: int, remaining: int) -> tuple[int, Int64Array]:
        """Return the smallest sufficient room and the packs that have it, new ones where none has."""
        at = bisect.bisect_left(self.ascending, length)
        if at < len(self.ascending):
            room = self.ascending.pop(at)
            return room, self.packs_with.pop(room)
        wanted = -(-remaining // (self.capacity // length))
        self.opened += wanted
        return self.capacity, np.arange(self.opened - wanted, self.opened, dtype=np.int64)


def _fill(rooms: _Rooms, lengths: npt.NDArray[Any]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Pack documents longest first, each where it leaves the least room.

    Returns:
        The documents by falling length, those of one length in the order given; the pack of each; and how
        many of these documents came into that pack before it.
    """
    packs_of, ranks_of = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    within = np.zeros(rooms.opened, np.int64)
    distinct, counts = np.unique(lengths, return_counts=True)

    def assign(packs: Int64Array, each: int) -> None:
        packs_of.append(np.repeat(packs, each))
        ranks_of.append((within[packs][:, None] + np.arange(each)).ravel())
        within[packs] += each

    for length, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while remaining:
            room, packs = rooms.take(length, remaining)
            if rooms.opened > len(within):
                within = np.concatenate([within, np.zeros(max(rooms.opened, len(within)), np.int64)])
            each = room // length
            full = min(len(packs), remaining // each)
            assign(packs[:full], each)
            rooms.put_back(room - each * length, packs[:full])
            remaining -= full * each
            if remaining and full < len(packs):  # the last ones fill a part of one more pack
                assign(packs[full : full + 1], remaining)
                rooms.put_back(room - remaining * length, packs[full : full + 1])
                full, remaining = full + 1, 0
            rooms.put_back(room, packs[full:])
    longest = int(distinct[-1]) if len(distinct) else 0
    return _argsort(longest - lengths), np.concatenate(packs_of), np.concatenate(ranks_of)


def _argsort(values: npt.NDArray[Any]) -> Int64Array:
    """Return a stable order of non-negative values: numpy's radix sort, 16 bits at a time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    largest = int(values.max()) if len(values) else 0
    for shift in range(16, largest.bit_length(), 16):
        digits = ((values >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def lower_bound(lengths: Int64Array, capacity: int) -> int:
    """Return a number of packs that no packing can go below.

    The larger of ceil(sum / capacity) and the L2 bound of Martello and Toth (Discrete Applied Mathematics 28,
    1990).
    """
    if len(lengths) == 0:
        return 0
    values, counts = np.unique(lengths, return_counts=True)
    number = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(values * counts)]).astype(np.int64)
    half = int(np.searchsorted(values, capacity // 2, side="right"))
    thresholds = np.concatenate([[0], values[:half]]).astype(np.int64)
    alone = np.searchsorted(values, capacity - thresholds, side="right")
    small = np.searchsorted(values, thresholds, side="left")
    middle_room = (number[alone] - number[half]) * capacity - (total[alone] - total[half])
    rest = (total[half] - total[small]) - middle_room
    more = int(np.maximum(0, -(-rest // capacity)).max())
    return max(-(-int(total[-1]) // capacity), int(number[-1] - number[half]) + more)
