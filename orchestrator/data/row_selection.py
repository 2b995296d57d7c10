"""Select the rows of an epoch: duplicates, sample, rows held out for evaluation, repeat and weight.

Rows are compared by the hashes in the token stores, so no tokens are read. Whether a row is held out depends
on its hash and the seed only: not on the order of rows, on the epoch, on the number of workers, or on other
rows, so that it stays as it is when rows are appended, and equal rows are always on the same side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.config.schema import SourceSpec
from orchestrator.data.token_cache import TokenStore
from orchestrator.errors import SpecError

Int64Array = npt.NDArray[np.int64]
Uint64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """The part of the sources' rows that a packed dataset reads.

    Attributes:
        share: Fraction of the rows that is held out for evaluation; 0 holds out none.
        held_out: Whether to read the held-out rows, each once, instead of the others.
    """

    share: float = 0.0
    held_out: bool = False


ALL_ROWS = Split()


@dataclass(frozen=True)
class Selection:
    """The rows of one source that an epoch reads.

    Attributes:
        rows: Row numbers, those of one pass ascending, int64, shape [readings].
        duplicate: Rows of the source that equal an earlier row of this or an earlier source.
        held_out: Rows held out for evaluation.
    """

    rows: Int64Array
    duplicate: int
    held_out: int


def select_rows(
    stores: Sequence[TokenStore],
    sources: Sequence[SourceSpec],
    seed: int,
    split: Split = ALL_ROWS,
    deduplicate: bool = False,
) -> list[Selection]:
    """Select the rows that an epoch reads of each source.

    Args:
        stores: Token store of each source.
        sources: Sample size, repeat and weight of each source.
        seed: Seed of samples, of the rows held out, and of the rows read once more for a fractional weight.
        split: Which rows are read.
        deduplicate: Whether to leave out rows that equal an earlier row, over all sources in order.

    Raises:
        SpecError: A sample is larger than its source, or the rows cannot be split.
    """
    firsts = first_occurrences([store.hashes for store in stores])
    # Seeded by position, so that a change of one source leaves the samples of the others as they are.
    generators = [np.random.default_rng([seed, number]) for number in range(len(stores))]
    samples: list[Int64Array] = []
    problems: list[str] = []
    for store, source, is_first, generator in zip(stores, sources, firsts, generators, strict=True):
        available = np.flatnonzero(is_first) if deduplicate else np.arange(len(store), dtype=np.int64)
        if source.sample is not None and source.sample > len(available):
            problems.append(_too_large_a_sample(store, source, len(available)))
            continue
        samples.append(sample_rows(available, source, generator))
    if problems:
        raise SpecError(*problems)
    held = _held_out(stores, samples, split.share, seed)
    return [
        Selection(
            rows=sample[is_held] if split.held_out else repeat_rows(sample[~is_held], source, generator),
            duplicate=int((~is_first).sum()),
            held_out=int(is_held.sum()),
        )
        for sample, is_held, source, is_first, generator in zip(
            samples, held, sources, firsts, generators, strict=True
        )
    ]


def sample_rows(available: Int64Array, source: SourceSpec, generator: np.random.Generator) -> Int64Array:
    """Return `source.sample` of the available rows, ascending; without a sample, all of them."""
    if source.sample is None:
        return available
    return np.sort(generator.choice(available, source.sample, replace=False))


def repeat_rows(rows: Int64Array, source: SourceSpec, generator: np.random.Generator) -> Int64Array:
    """Return each row repeat * weight times; for the fraction, a random part of them is read once more.

    Args:
        rows: Row numbers, ascending.
        source: Gives repeat and weight.
        generator: Draws the rows that are read once more.

    Returns:
        Row numbers, those of one pass ascending.
    """
    times = source.repeat * source.weight
    more = round((times - int(times)) * len(rows))
    once_more = np.sort(generator.choice(rows, more, replace=False)) if more else rows[:0]
    return np.concatenate([*[rows] * int(times), once_more])


def _too_large_a_sample(store: TokenStore, source: SourceSpec, available: int) -> str:
    empty, duplicate = store.manifest["rows_empty"], len(store) - available
    left = [f"{empty} that have nothing to learn"] if empty else []
    left += [f"{duplicate} that equal an earlier row"] if duplicate else []
    less = f" (and {' and '.join(left)})" if left else ""
    return (
        f"data source {source.path}: sample={source.sample} is above its {available} rows{less}; "
        "lower it, or use repeat or weight to read rows more than once"
    )


def first_occurrences(hashes: Sequence[Uint64Array]) -> list[BoolArray]:
    """Return which rows of each source equal no earlier row of it or of the sources before it.

    Args:
        hashes: Hashes of the rows of each source, uint64, shape [rows].
    """
    joined = np.concatenate([*hashes, np.zeros(0, np.uint64)])
    is_first = np.zeros(len(joined), np.bool_)
    is_first[np.unique(joined, return_index=True)[1]] = True
    ends = np.cumsum([len(each) for each in hashes])
    return np.split(is_first, ends)[:-1]


def count_equal(hashes: Uint64Array, others: Uint64Array) -> int:
    """Return how many of the rows with these hashes equal one of the other rows."""
    distinct, counts = np.unique(hashes, return_counts=True)
    if not len(distinct):
        return 0
    at = np.minimum(np.searchsorted(distinct, others), len(distinct) - 1)
    found = np.unique(at[distinct[at] == others])
    return int(counts[found].sum())


def _held_out(
    stores: Sequence[TokenStore], samples: Sequence[Int64Array], share: float, seed: int
) -> list[BoolArray]:
    """Return which rows of each sample are held out; there is at least one row on each side.

    Raises:
        SpecError: All rows are equal.
    """
    if not share:
        return [np.zeros(len(sample), np.bool_) for sample in samples]
    places = [_place(store.hashes[sample], seed) for store, sample in zip(stores, samples, strict=True)]
    joined = np.concatenate(places)
    if len(joined) == 0 or joined.min() == joined.max():
        raise SpecError(
            f"eval.share={share:g} cannot hold out rows of data.train: equal rows stay on the same side, and "
            f"its {len(joined)} rows are all equal; add rows, or use eval.data instead"
        )
    # Of few rows, chance may put none below the limit, or all.
    limit = min(max(_limit(share), joined.min() + np.uint64(1)), joined.max())
    return [place < limit for place in places]


def is_held_out(content_hash: int, share: float, seed: int) -> bool:
    """Return whether a row is held out of data with enough rows that chance leaves none on one side.

    Args:
        content_hash: Its hash in the token store.
        share: Fraction of the rows that is held out.
        seed: `run.seed`.
    """
    return bool(_place(np.array([content_hash], np.uint64), seed)[0] < _limit(share))


def _limit(share: float) -> np.uint64:
    return np.uint64(int(share * 2.0**64))


def _place(hashes: Uint64Array, seed: int) -> Uint64Array:
    """Return a uniform 64-bit number for each hash and this seed: the finalizer of splitmix64."""
    mixed = hashes ^ np.random.default_rng(seed).integers(0, 2**64, 1, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
