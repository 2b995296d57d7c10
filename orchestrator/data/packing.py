"""Packing documents into packs of equal capacity: global best-fit-decreasing on a length histogram.

After a document of length l is put into the fullest pack that still takes it, that pack is again the fullest
one that may take the next of the same length. So a pack of room r takes floor(r / l) of them at once, and the
work grows with the number of distinct lengths and not with the number of documents.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


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


def one_each(lengths: Int64Array) -> Packs:
    """Return a pack for every document: what `packing: none` means."""
    count = len(lengths)
    return Packs(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def best_fit(lengths: Int64Array, capacity: int, seed: int) -> Packs:
    """Pack documents of all lengths together, longest first, each where it leaves the least room.

    Args:
        lengths: Tokens of each document, all between 1 and `capacity`, shape [documents].
        capacity: Tokens in a pack.
        seed: Decides which of several documents of one length goes where, and the order inside a pack.

    Returns:
        Packs that hold every document exactly once.

    Raises:
        ValueError: A length is outside 1..capacity.
    """
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"document lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity}")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    pack_of, count = _assign(*np.unique(lengths, return_counts=True), capacity)
    # A second shuffle keeps documents of one length from standing side by side in every pack.
    mixed = generator.permutation(len(lengths))
    order = mixed[np.argsort(pack_of[mixed], kind="stable")]
    bounds = np.searchsorted(pack_of[order], np.arange(count + 1)).astype(np.int64)
    return Packs(by_length[order].astype(np.int64), bounds)


def _assign(distinct: Int64Array, counts: Int64Array, capacity: int) -> tuple[Int64Array, int]:
    """Return the pack of every document in order of falling length, and the number of packs."""
    rooms: list[int] = []  # room that is left, ascending, each with the packs that have it
    packs_with: dict[int, Int64Array] = {}
    assigned: list[Int64Array] = []
    opened = 0

    def put_back(room: int, packs: Int64Array) -> None:
        if room == 0 or len(packs) == 0:
            return
        if room in packs_with:
            packs_with[room] = np.concatenate([packs_with[room], packs])
        else:
            packs_with[room] = packs
            bisect.insort(rooms, room)

    for length, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while remaining:
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                packs = packs_with.pop(room)
            else:
                room = capacity
                packs = np.arange(opened, opened - (-remaining // (capacity // length)), dtype=np.int64)
                opened += len(packs)
            each = room // length
            full = min(len(packs), remaining // each)
            assigned.append(np.repeat(packs[:full], each))
            put_back(room - each * length, packs[:full])
            remaining -= full * each
            if remaining and full < len(packs):  # the last ones fill a part of one more pack
                assigned.append(np.repeat(packs[full : full + 1], remaining))
                put_back(room - remaining * length, packs[full : full + 1])
                full, remaining = full + 1, 0
            put_back(room, packs[full:])
    return np.concatenate(assigned), opened


def lower_bound(lengths: Int64Array, capacity: int) -> int:
    """Return a number of packs that no packing can go below.

    The larger of ceil(sum / capacity) and the L2 bound of Martello and Toth (Discrete Applied Mathematics 28,
    1990).
    """
    if len(lengths) == 0:
        return 0
    ordered = np.sort(lengths)
    total = np.concatenate([[0], np.cumsum(ordered)]).astype(np.int64)
    half = int(np.searchsorted(ordered, capacity // 2, side="right"))
    thresholds = np.concatenate([[0], np.unique(ordered[:half])]).astype(np.int64)
    alone = np.searchsorted(ordered, capacity - thresholds, side="right")
    small = np.searchsorted(ordered, thresholds, side="left")
    middle_room = (alone - half) * capacity - (total[alone] - total[half])
    rest = (total[half] - total[small]) - middle_room
    more = int(np.maximum(0, -(-rest // capacity)).max())
    return max(-(-int(total[-1]) // capacity), len(ordered) - half + more)
