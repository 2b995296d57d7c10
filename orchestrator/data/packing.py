"""Bin packing of documents into packs of equal capacity, over the whole corpus, on lengths only.

Best fit has two phases. First the corpus is shuffled and cut into packs filled up to a mark somewhat below
capacity, so that packs are random samples of the corpus and have similar cost. Then the remaining documents
are packed best-fit-decreasing on a histogram of lengths: after a document of length l is put into the fullest
pack that fits it, that pack is again the fullest that fits the next document of length l, so a pack with r
free slots takes floor(r / l) of them at once, and the time grows with the number of distinct lengths instead
of the number of documents.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.integer]
# Free slots that the first phase leaves in a pack, in mean document lengths: enough for an exact fill by the
# second phase, and few enough that packs stay random samples.
_FREE_DOCUMENTS = 3
_SHUFFLE_CHUNK = 2**16  # numbers; a chunk stays in the CPU cache
_NUMPY_SHUFFLE_BITS = 16  # up to 2**16 numbers numpy's shuffle takes less than a millisecond
_MAX_OVER_LOWER_BOUND = 1.002  # packs over the lower bound that random composition may cost


@dataclass(frozen=True)
class Packs:
    """Assignment of documents to packs.

    Attributes:
        documents: Document numbers in the order of packs, int64, shape [documents].
        bounds: Start of each pack in `documents`, and the end of the last, int64, shape [packs + 1].
    """

    documents: Int64Array
    bounds: Int64Array

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, pack: int) -> Int64Array:
        """Return the document numbers of one pack, in order."""
        return self.documents[self.bounds[pack] : self.bounds[pack + 1]]

    def sums(self, values: npt.NDArray[np.int64]) -> Int64Array:
        """Return the sum of `values` (one per document) over each pack, int64, shape [packs]."""
        totals = np.concatenate([[0], np.cumsum(values[self.documents], dtype=np.int64)])
        sums: Int64Array = totals[self.bounds[1:]] - totals[self.bounds[:-1]]
        return sums


def one_each(lengths: Int64Array) -> Packs:
    """Return one pack per document (`packing: none`)."""
    count = len(lengths)
    return Packs(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


@dataclass(frozen=True)
class Pieces:
    """Slices of documents, in stream order.

    Attributes:
        document: Document number of each piece, int64, shape [pieces].
        start: Offset of its first token in the document, int64, shape [pieces].
        length: Its number of tokens, int64, shape [pieces].
    """

    document: Int64Array
    start: Int64Array
    length: Int64Array


def concat(lengths: Int64Array, capacity: int, seed: int) -> tuple[Pieces, Packs]:
    """Concatenate all documents in random order and cut the stream at every multiple of the capacity.

    Args:
        lengths: Length of each document, at least 1, shape [documents].
        capacity: Tokens in a pack; only the last pack holds fewer.
        seed: Seed of the order.

    Returns:
        The pieces between document boundaries and cuts, and packs of pieces.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])  # end of each document in the stream, [documents]
    total = int(ends[-1]) if len(ends) else 0
    # A cut at the end of a document is one border, not two: pieces are never empty.
    borders = np.union1d(ends, np.append(np.arange(capacity, total, capacity), total)) if total else ends
    # A piece ends at a document end or at a cut, whichever comes first: starts and borders are [pieces].
    starts = np.concatenate([[0], borders[:-1]]).astype(np.int64) if total else borders
    owner = np.searchsorted(ends, starts, side="right")  # index into `order` of each piece's document
    document_starts = ends[owner] - lengths[order][owner]
    pieces = Pieces(order[owner].astype(np.int64), starts - document_starts, borders - starts)
    cuts = np.arange(0, total, capacity)
    bounds = np.append(np.searchsorted(starts, cuts), len(starts)).astype(np.int64)
    return pieces, Packs(np.arange(len(starts), dtype=np.int64), bounds)


def best_fit(lengths: Int64Array, capacity: int, seed: int) -> Packs:
    """Pack documents without splitting them.

    Args:
        lengths: Length of each document, between 1 and `capacity`, shape [documents].
        capacity: Tokens in a pack.
        seed: Seed of the composition of packs.

    Returns:
        Packs that contain every document exactly once.

    Raises:
        ValueError: A length is outside 1..capacity.
    """
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"document lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity}")
    mark = capacity - int(_FREE_DOCUMENTS * lengths.mean())
    if mark < capacity // 2:  # packs of a few documents: random prefixes would leave too much free space
        return best_fit_decreasing(lengths, capacity, seed)
    random = _pack(lengths, capacity, mark, seed)
    if len(random) <= _MAX_OVER_LOWER_BOUND * lower_bound(lengths, capacity):
        return random
    decreasing = best_fit_decreasing(lengths, capacity, seed)
    return random if len(random) <= len(decreasing) else decreasing


def best_fit_decreasing(lengths: Int64Array, capacity: int, seed: int) -> Packs:
    """Pack documents longest first, each into the fullest pack that fits it; arguments as for `best_fit`."""
    return _pack(lengths, capacity, capacity, seed)


def _pack(lengths: Int64Array, capacity: int, mark: int, seed: int) -> Packs:
    """Fill packs at random up to a mark, then the rest best-fit-decreasing; mark = capacity skips phase 1."""
    order = _shuffle(len(lengths), seed)
    # Lengths in shuffled order, [documents]; the narrow dtype halves the time of sorting.
    shuffled: Lengths = lengths.astype("u2" if capacity < 2**16 else "u4")[order]
    prefix = _fill_prefixes(shuffled, capacity, mark)
    bins = _OpenPacks.of(capacity, capacity - prefix.loads)
    rest = np.append(prefix.held, np.arange(prefix.count, len(order)))  # indices into `order` for phase 2
    by_length, packs, ranks = _fill(bins, shuffled[rest])
    prefix_sizes = np.zeros(bins.opened, np.int64)  # documents of phase 1 in each pack, [packs]
    prefix_sizes[: len(prefix.sizes)] = prefix.sizes
    bounds = np.append(0, np.cumsum(prefix_sizes + np.bincount(packs, minlength=bins.opened)))
    # In each pack the documents of phase 1 come first, then those of phase 2 in the order of their ranks.
    documents = np.empty(len(order), np.int64)
    positions = (bounds[:-1] + prefix_sizes)[packs] + ranks
    documents[positions] = order[rest[by_length]]
    is_phase_1 = np.ones(len(order), np.bool_)
    is_phase_1[positions] = False
    documents[is_phase_1] = np.delete(order[: prefix.count], prefix.held)
    return Packs(documents, bounds)


def _shuffle(count: int, seed: int) -> Int64Array:
    """Return a random permutation of range(count), for large counts three times as fast as numpy.

    Multiplying by odd numbers and xoring the upper half of the bits into the lower half are bijections on
    k-bit numbers; together they mix the bits like the finalizer of MurmurHash3. Numbers of `count` or more
    are dropped.
    """
    generator = np.random.default_rng(seed)
    bits = count.bit_length()
    if bits <= _NUMPY_SHUFFLE_BITS or bits > 32:
        return generator.permutation(count)
    factors = generator.integers(0, 2**31, 3, dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    order = np.empty(count, np.int64)
    at = 0
    for first in range(0, 1 << bits, _SHUFFLE_CHUNK):
        numbers = np.arange(first, first + _SHUFFLE_CHUNK, dtype=np.uint32)
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
class _Prefixes:
    """The start of a document stream, cut into prefixes of packs.

    Attributes:
        count: Documents of the stream that were used or held back.
        held: Indices of the documents held back for phase 2, ascending.
        sizes: Documents in each prefix, shape [packs].
        loads: Tokens in each prefix, shape [packs].
    """

    count: int
    held: Int64Array
    sizes: Int64Array
    loads: Int64Array


def _fill_prefixes(lengths: Lengths, capacity: int, mark: int) -> _Prefixes:
    """Cut a document stream into segments of `mark` tokens, each the prefix of a pack.

    A document belongs to the segment in which it starts, so the last one of a segment can exceed the mark. If
    it also exceeds the capacity of the pack, it is held back for phase 2.
    """
    nothing = np.zeros(0, np.int64)
    if mark >= capacity:
        return _Prefixes(0, nothing, nothing, nothing)
    ends = np.cumsum(lengths, dtype=np.int64)  # end of each document in the stream, [documents]
    total = int(ends[-1])
    lasts = np.searchsorted(ends, np.arange(1, total // mark + 1) * mark)
    lasts = lasts[np.diff(lasts, prepend=-1) > 0]  # a document can be longer than a segment
    firsts = np.append(0, lasts + 1)[:-1]
    loads = ends[lasts] - ends[firsts] + lengths[firsts]
    over = loads > capacity
    # Held-back tokens that do not fit the free space of any prefix and therefore open new packs.
    alone = int(lengths[lasts[over & (lengths[lasts] > 2 * (capacity - mark))]].sum())
    packs = min(len(lasts), -(-(total - alone) // capacity))
    if packs == 0:
        return _Prefixes(0, nothing, nothing, nothing)
    lasts, firsts, loads, over = lasts[:packs], firsts[:packs], loads[:packs], over[:packs]
    held = lasts[over]
    loads[over] -= lengths[held]
    return _Prefixes(int(lasts[-1]) + 1, held, lasts - firsts + 1 - over, loads)


@dataclass
class _OpenPacks:
    """Packs grouped by their free slots.

    Attributes:
        capacity: Slots of an empty pack.
        opened: Packs opened so far; the next one has this number.
        ascending: Numbers of free slots for which there are packs, ascending.
        packs_with: Pack numbers by their free slots.
    """

    capacity: int
    opened: int = 0
    ascending: list[int] = field(default_factory=list)
    packs_with: dict[int, Int64Array] = field(default_factory=dict)

    @classmethod
    def of(cls, capacity: int, free: Int64Array) -> _OpenPacks:
        """Return packs with these numbers of free slots, shape [packs]."""
        self = cls(capacity, opened=len(free))
        order = np.argsort(free, kind="stable")
        self.ascending = np.unique(free[free > 0]).tolist()
        # Parts: packs without a free slot, then one part for each entry of `ascending`, then an empty one.
        parts = np.split(order, np.searchsorted(free[order], [*self.ascending, capacity + 1]))[1:-1]
        self.packs_with = dict(zip(self.ascending, parts, strict=True))
        return self

    def put_back(self, free: int, packs: Int64Array) -> None:
        """Return packs with `free` slots to the pool."""
        if free == 0 or len(packs) == 0:
            return
        if free in self.packs_with:
            self.packs_with[free] = np.concatenate([self.packs_with[free], packs])
        else:
            self.packs_with[free] = packs
            bisect.insort(self.ascending, free)

    def take(self, length: int, remaining: int) -> tuple[int, Int64Array]:
        """Return the free slots of the fullest packs that fit `length`, and these packs, or open new ones."""
        # The fewest free slots that are enough: best fit. All packs with that number are taken at once.
        at = bisect.bisect_left(self.ascending, length)
        if at < len(self.ascending):
            free = self.ascending.pop(at)
            return free, self.packs_with.pop(free)
        new = -(-remaining // (self.capacity // length))
        self.opened += new
        return self.capacity, np.arange(self.opened - new, self.opened, dtype=np.int64)


def _fill(bins: _OpenPacks, lengths: Lengths) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Pack documents longest first, each into the fullest pack that fits it.

    Returns:
        Document indices by falling length (stable), the pack of each, and its rank among the documents that
        this call puts into that pack; each of shape [documents].
    """
    packs_of, ranks_of = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    filled = np.zeros(bins.opened, np.int64)  # documents put into each pack so far, [packs]
    distinct, counts = np.unique(lengths, return_counts=True)

    def assign(packs: Int64Array, per_pack: int) -> None:
        packs_of.append(np.repeat(packs, per_pack))
        ranks_of.append((filled[packs][:, None] + np.arange(per_pack)).ravel())  # [packs, per_pack] flattened
        filled[packs] += per_pack

    for length, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while remaining:
            free, packs = bins.take(length, remaining)
            if bins.opened > len(filled):  # grow by doubling
                filled = np.concatenate([filled, np.zeros(max(bins.opened, len(filled)), np.int64)])
            # Afterwards these packs have less than `length` free, so none is taken twice for one length.
            per_pack = free // length
            full = min(len(packs), remaining // per_pack)
            assign(packs[:full], per_pack)
            bins.put_back(free - per_pack * length, packs[:full])
            remaining -= full * per_pack
            if remaining and full < len(packs):  # fewer than per_pack documents remain: one more pack
                assign(packs[full : full + 1], remaining)
                bins.put_back(free - remaining * length, packs[full : full + 1])
                full, remaining = full + 1, 0
            bins.put_back(free, packs[full:])
    # The loop assigned documents by falling length; within a length, in the order of their indices.
    longest = int(distinct[-1]) if len(distinct) else 0
    return _argsort(longest - lengths), np.concatenate(packs_of), np.concatenate(ranks_of)


def _argsort(values: Lengths) -> Int64Array:
    """Return the stable argsort of non-negative integers, by numpy's radix sort on 16 bits at a time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    largest = int(values.max()) if len(values) else 0
    for shift in range(16, largest.bit_length(), 16):
        digits = ((values >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def lower_bound(lengths: Int64Array, capacity: int) -> int:
    """Return a lower bound on the number of packs.

    The larger of ceil(sum / capacity) and the L2 bound of Martello and Toth (Discrete Applied Mathematics 28,
    1990).
    """
    if len(lengths) == 0:
        return 0
    values, counts = np.unique(lengths, return_counts=True)
    # number[i], total[i]: documents and tokens of the i smallest distinct lengths, [distinct + 1].
    number = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(values * counts)]).astype(np.int64)
    # Every document above capacity / 2 needs its own pack. For each threshold t, [thresholds]: those above
    # capacity - t leave no room for a document of t or more tokens, so only the packs of the others between
    # (middle_room) can hold documents of t..capacity / 2; what exceeds that room needs further packs.
    half = int(np.searchsorted(values, capacity // 2, side="right"))
    thresholds = np.concatenate([[0], values[:half]]).astype(np.int64)
    alone = np.searchsorted(values, capacity - thresholds, side="right")
    small = np.searchsorted(values, thresholds, side="left")
    middle_room = (number[alone] - number[half]) * capacity - (total[alone] - total[half])
    rest = (total[half] - total[small]) - middle_room
    more = int(np.maximum(0, -(-rest // capacity)).max())
    return max(-(-int(total[-1]) // capacity), int(number[-1] - number[half]) + more)
