"""Which packs form which step, and the batches that are made of them.

Packs of all epochs form one stream. Step s takes `global_batch_size` packs from it, starting at s x
global_batch_size, so any step is found without reading what comes before, and which packs it holds depends on
the seed and the global batch only: never on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from orchestrator.data.balance import Geometry, deal, epoch_order, wait_factor
from orchestrator.data.corpus import Documents
from orchestrator.data.packing import Packs

Int64Array = npt.NDArray[np.int64]
_ORDERS_KEPT = 4  # a step spans two epochs at most, unless an epoch is smaller than a step
_PADDING_DOCUMENT_TOKENS = 128  # padding is cut into short documents, so that it costs next to no attention


@dataclass(frozen=True)
class MicroBatch:
    """Packs of one forward pass, laid end to end in a row of packs x max_length slots, or a part of it.

    A part is what one of several workers that share a row holds: T slots side by side, and the labels that
    belong to them. Documents are always those of the whole row, since attention is over all of it.

    Attributes:
        input_ids: Token ids, padding included, int64, shape [T].
        position_ids: Position of each token in its own document, int64, shape [T].
        document_lengths: Tokens of each document and each piece of padding of the whole row, in order.
        label_positions: Positions whose output is scored, ascending, int64, shape [trained_tokens].
        labels: The token that should follow each of them, int64, shape [trained_tokens].
        tokens: Real tokens, without padding.
        square_tokens: Sum of squared lengths of the real documents, which attention is paid for; of a part,
            its share.
        real_lengths: Tokens of each real document of the whole row, padding left out.
    """

    input_ids: Int64Array
    position_ids: Int64Array
    document_lengths: tuple[int, ...]
    label_positions: Int64Array
    labels: Int64Array
    tokens: int
    square_tokens: float
    real_lengths: tuple[int, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """Tokens that are targets of the loss."""
        return len(self.labels)


@dataclass(frozen=True)
class Order:
    """How the stream of packs is ordered.

    Attributes:
        seed: Decides the order of every epoch.
        shuffle: Whether there is any but that of the packs.
        window_steps: Steps among which packs of like cost come together; 1 leaves that to chance.
        slot_cost: Cost of one slot of a pack in any unit.
        square_cost: Cost of one squared token of a document, in the same unit.
        joined: Whether tokens attend to all earlier ones of their pack, as if it were one document.
    """

    seed: int
    shuffle: bool = True
    window_steps: int = 1
    slot_cost: float = 1.0
    square_cost: float = 0.0
    joined: bool = False


class PackLoader:
    """Batches of one data set; holds no position, so every call is a seek."""

    def __init__(self, documents: Documents, packs: Packs, geometry: Geometry, order: Order) -> None:
        self._documents, self._packs, self._geometry, self._how = documents, packs, geometry, order
        self._orders: dict[int, Int64Array] = {}
        self._trained = packs.sums(documents.trained)

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Cost of each pack, shape [packs]."""
        lengths = self._documents.lengths
        squares = self._packs.sums(lengths) ** 2 if self._how.joined else self._packs.sums(lengths**2)
        fixed = self._how.slot_cost * self._geometry.max_length
        return (fixed + self._how.square_cost * squares).astype(np.float64)

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

    def micro_batches(
        self, step: int, rank: int, last: int | None = None, part: int = 0
    ) -> Iterator[MicroBatch]:
        """Yield one worker's micro-batches of a step.

        Args:
            step: Number of the optimizer step, from 0.
            rank: Data-parallel rank.
            last: Packs in all; places beyond it are empty.
            part: Which part of each row the worker holds, where several share it.
        """
        numbers = self.pack_numbers(step, last)
        costs = np.array([0.0 if number is None else self.costs[number] for number in numbers])
        for places in deal(costs[None], self._geometry)[0, rank]:
            yield self.assemble([numbers[place] for place in places], part)

    def assemble(self, numbers: list[int | None], part: int = 0) -> MicroBatch:
        """Lay packs end to end, each padded to max_length, and return one worker's part of the row.

        Documents that do not reach into the part are not read; a first token is never a label of what is
        before.
        """
        capacity, parts = self._geometry.max_length, self._geometry.sequence_parallel_size
        input_ids = np.zeros(capacity * len(numbers), np.int64)
        share = len(input_ids) // parts
        mine = slice(part * share, (part + 1) * share)
        trained, is_real = np.zeros(len(input_ids), np.bool_), np.zeros(len(input_ids), np.bool_)
        lengths: list[int] = []
        real: list[int] = []
        for place, number in enumerate(numbers):
            at, sizes = place * capacity, []
            for member in [] if number is None else self._packs.members(number).tolist():
                size = int(self._documents.lengths[member])
                if at < mine.stop and at + size > mine.start:
                    document = self._documents.document(member)
                    input_ids[at : at + size] = document.tokens
                    trained[at : at + size] = document.trained
                    trained[at] = False  # the first token has nothing before it to be predicted from
                sizes.append(size)
                at += size
            sizes = [sum(sizes)] if self._how.joined and sizes else sizes
            is_real[place * capacity : at] = True
            real += sizes
            lengths += sizes + _padding((place + 1) * capacity - at)
        targets = np.flatnonzero(trained)
        # A label belongs to the slot before it, whose output is to foretell it, and so to whoever holds that.
        targets = targets[slice(*np.searchsorted(targets - 1, [mine.start, mine.stop]))]
        return MicroBatch(
            input_ids=input_ids[mine],
            position_ids=np.concatenate([np.arange(size) for size in lengths])[mine],
            document_lengths=tuple(lengths),
            label_positions=targets - 1 - mine.start,
            labels=input_ids[targets],
            tokens=int(np.count_nonzero(is_real[mine])),
            square_tokens=sum(size * size for size in real) / parts,
            real_lengths=tuple(real),
        )

    def wait_factors(self) -> tuple[float, float]:
        """Return how much longer an epoch takes than without waiting: by chance, and as ordered here."""
        chance = epoch_order(self.costs, self._how.seed, 0, self._geometry.global_batch_size, 1)
        before = wait_factor(self.costs, chance, self._geometry, dealt=False)
        return before, wait_factor(self.costs, self._order(0), self._geometry, dealt=True)

    def _pack_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._packs))
        return int(self._order(epoch)[index]) if self._how.shuffle else index

    def _order(self, epoch: int) -> Int64Array:
        if epoch not in self._orders:
            if len(self._orders) >= _ORDERS_KEPT:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = epoch_order(
                self.costs, self._how.seed, epoch, self._geometry.global_batch_size, self._how.window_steps
            )
        return self._orders[epoch]


def _padding(slots: int) -> list[int]:
    whole, rest = divmod(slots, _PADDING_DOCUMENT_TOKENS)
    return [_PADDING_DOCUMENT_TOKENS] * whole + [rest] * (rest > 0)
