"""Which packs form which step, and the batches that are made of them.

Packs of all epochs form one stream. Step s takes `global_batch_size` packs from it, starting at s x
global_batch_size, so any step is found without reading what comes before, and which packs it holds depends on
the seed and the global batch only: never on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from orchestrator.data.packing import Packs
from orchestrator.data.store import TokenStore

Int64Array = npt.NDArray[np.int64]
_PADDING_DOCUMENT_TOKENS = 128  # padding is cut into short documents, so that it costs next to no attention


@dataclass(frozen=True)
class MicroBatch:
    """Packs of one forward pass, laid end to end in a single row of T = packs x max_length slots.

    Attributes:
        input_ids: Token ids, padding included, int64, shape [T].
        position_ids: Position of each token in its own document, int64, shape [T].
        document_lengths: Tokens of each document and each piece of padding, in order, sum T.
        label_positions: Positions whose output is scored, ascending, int64, shape [trained_tokens].
        labels: The token that should follow each of them, int64, shape [trained_tokens].
        tokens: Real tokens, without padding.
        square_tokens: Sum of squared lengths of the real documents: what attention is paid for.
    """

    input_ids: Int64Array
    position_ids: Int64Array
    document_lengths: tuple[int, ...]
    label_positions: Int64Array
    labels: Int64Array
    tokens: int
    square_tokens: int

    @property
    def trained_tokens(self) -> int:
        """Tokens that are targets of the loss."""
        return len(self.labels)


@dataclass(frozen=True)
class Geometry:
    """Sizes that lay out a step: packs in it, workers that share it, packs in one forward pass."""

    max_length: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one worker in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


class PackLoader:
    """Batches of one data set; holds no position, so every call is a seek."""

    def __init__(
        self, store: TokenStore, packs: Packs, geometry: Geometry, seed: int, shuffle: bool = True
    ) -> None:
        self._store, self._packs, self._geometry = store, packs, geometry
        self._seed, self._shuffle = seed, shuffle
        sums = np.concatenate([[0], np.cumsum(store.trained[packs.documents])])
        self._trained = sums[packs.bounds[1:]] - sums[packs.bounds[:-1]]

    def packs(self, epochs: float) -> int:
        """Return the packs in so many epochs; a part of a pack counts as one."""
        return max(1, math.ceil(round(epochs * len(self._packs), 6)))

    def steps(self, epochs: float) -> int:
        """Return the optimizer steps in so many epochs; the last one may hold fewer packs."""
        return math.ceil(self.packs(epochs) / self._geometry.global_batch_size)

    def epoch(self, step: int, last: int | None = None) -> float:
        """Return the epochs that lie before a step, as a fraction; at `last` packs in all."""
        before = step * self._geometry.global_batch_size
        return (before if last is None else min(before, last)) / len(self._packs)

    def pack_numbers(self, step: int, last: int | None = None) -> list[int | None]:
        """Return the packs of a step; None for a place past the end of the data, at `last` packs in all."""
        size = self._geometry.global_batch_size
        places = range(step * size, (step + 1) * size)
        return [None if last is not None and place >= last else self._pack_at(place) for place in places]

    def trained_tokens(self, step: int, last: int | None = None) -> int:
        """Return the trained tokens of a step over all workers, from the plan and without communication."""
        return int(sum(self._trained[pack] for pack in self.pack_numbers(step, last) if pack is not None))

    def micro_batches(self, step: int, rank: int, last: int | None = None) -> Iterator[MicroBatch]:
        """Yield one worker's micro-batches of a step.

        Args:
            step: Number of the optimizer step, from 0.
            rank: Data-parallel rank.
            last: Packs in all; places beyond it are empty.
        """
        numbers, geometry = self.pack_numbers(step, last), self._geometry
        for micro in range(geometry.micro_batches):
            start = (micro * geometry.data_parallel_size + rank) * geometry.micro_batch_size
            yield self.assemble(numbers[start : start + geometry.micro_batch_size])

    def assemble(self, numbers: list[int | None]) -> MicroBatch:
        """Lay packs end to end, each padded to max_length."""
        slots = self._geometry.max_length * len(numbers)
        input_ids, position_ids = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        trained = np.zeros(slots, np.bool_)
        lengths: list[int] = []
        real: list[int] = []
        at = 0
        for place, number in enumerate(numbers, start=1):
            for member in [] if number is None else self._packs.members(number).tolist():
                document = self._store.document(member)
                size = len(document.tokens)
                input_ids[at : at + size] = document.tokens
                position_ids[at : at + size] = np.arange(size)
                trained[at : at + size] = document.trained
                trained[at] = False  # the first token has nothing before it to be predicted from
                real.append(size)
                lengths.append(size)
                at += size
            while at < place * self._geometry.max_length:
                size = min(_PADDING_DOCUMENT_TOKENS, place * self._geometry.max_length - at)
                position_ids[at : at + size] = np.arange(size)
                lengths.append(size)
                at += size
        targets = np.flatnonzero(trained)
        return MicroBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            document_lengths=tuple(lengths),
            label_positions=targets - 1,
            labels=input_ids[targets],
            tokens=sum(real),
            square_tokens=sum(size * size for size in real),
        )

    def _pack_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._packs))
        return int(_order(len(self._packs), self._seed, epoch)[index]) if self._shuffle else index


@lru_cache(maxsize=4)
def _order(packs: int, seed: int, epoch: int) -> Int64Array:
    return np.random.default_rng([seed, epoch]).permutation(packs)
