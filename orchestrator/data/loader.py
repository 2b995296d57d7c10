"""Yield the micro-batches of every optimizer step from packed documents.

The packs of all epochs form one stream. Step s takes `global_batch_size` packs from position s *
global_batch_size, so any step can be computed without reading the ones before it, and its packs depend on the
seed and the global batch size only, not on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from orchestrator.data.balance import BatchShape, assign_to_ranks, epoch_order, wait_factor
from orchestrator.data.corpus import Documents
from orchestrator.data.packing import Packs

Int64Array = npt.NDArray[np.int64]
_ORDERS_KEPT = 4  # a step spans at most two epochs, unless an epoch is smaller than a step
# Padding is split into documents of this length, so that attention over it costs next to nothing.
_PADDING_DOCUMENT_TOKENS = 128


@dataclass(frozen=True)
class MicroBatch:
    """The packs of one forward pass, concatenated into one row, or a shard of it.

    Each pack has max_length slots, unless `BatchShape.pads_packs` is false: then only the end of the row is
    padded, to a multiple of the sequence parallel size.

    Under sequence parallelism each rank holds a shard: T consecutive slots and the labels predicted from
    them. `document_lengths` always describe the whole row, because attention runs over the whole row.

    Attributes:
        input_ids: Token ids including padding, int64, shape [T].
        position_ids: Position of each token in its document, int64, shape [T].
        document_lengths: Length of each document and each padding document of the whole row, in order.
        label_positions: Slots whose output is scored, ascending, int64, shape [trained_tokens].
        labels: Next token of each of these slots, int64, shape [trained_tokens].
        tokens: Tokens without padding.
        square_tokens: Sum of squared lengths of the real documents, for attention FLOPs; a shard has its
            fraction.
        real_lengths: Length of each real document of the whole row, without padding documents.
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
class SamplerConfig:
    """Order of the packs in an epoch.

    Attributes:
        seed: Seed of the shuffle of every epoch.
        shuffle: Whether to shuffle; otherwise packs are read in the order of the packed dataset.
        balance_window_steps: Steps within which packs are sorted by cost; 1 shuffles only.
        slot_cost: Cost of one slot of a pack, in any unit.
        squared_length_cost: Cost per squared token of a document (attention), in the same unit.
        cross_document_attention: Whether tokens attend to all earlier tokens of their pack, as if the pack
            were one document.
    """

    seed: int
    shuffle: bool = True
    balance_window_steps: int = 1
    slot_cost: float = 1.0
    squared_length_cost: float = 0.0
    cross_document_attention: bool = False


class PackLoader:
    """Micro-batches of one packed dataset; stateless, so reading any step is a seek."""

    def __init__(
        self, documents: Documents, packs: Packs, batch_shape: BatchShape, sampler: SamplerConfig
    ) -> None:
        self._documents, self._packs, self._batch_shape, self._sampler = (
            documents,
            packs,
            batch_shape,
            sampler,
        )
        self._orders: dict[int, Int64Array] = {}
        self._trained = packs.sums(documents.trained)

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Cost of each pack, shape [packs]."""
        lengths = self._documents.lengths
        if self._sampler.cross_document_attention:
            squares = self._packs.sums(lengths) ** 2
        else:
            squares = self._packs.sums(lengths**2)
        pads = self._batch_shape.pads_packs
        slots = self._batch_shape.max_length if pads else self._packs.sums(lengths)
        costs = self._sampler.slot_cost * slots + self._sampler.squared_length_cost * squares
        return costs.astype(np.float64)

    def packs(self, epochs: float) -> int:
        """Return the number of packs in `epochs`, rounded up."""
        # Rounded first: 1.1 epochs of 50 packs are 55.00000000000001 in floating point, and not 56 packs.
        return max(1, math.ceil(round(epochs * len(self._packs), 6)))

    def steps(self, epochs: float) -> int:
        """Return the number of optimizer steps in `epochs`; the last step may be partial."""
        return math.ceil(self.packs(epochs) / self._batch_shape.global_batch_size)

    def epoch(self, step: int, last: int | None = None) -> float:
        """Return the epochs completed before a step, as a fraction; `last` is the total number of packs."""
        before = step * self._batch_shape.global_batch_size
        return (before if last is None else min(before, last)) / len(self._packs)

    def pack_numbers(self, step: int, last: int | None = None) -> list[int | None]:
        """Return the packs of a step, None for positions at or after `last` (the total number of packs)."""
        size = self._batch_shape.global_batch_size
        return [
            None if last is not None and position >= last else self._pack_at(position)
            for position in range(step * size, (step + 1) * size)
        ]

    def trained_tokens(self, step: int, last: int | None = None) -> int:
        """Return the trained tokens of a step over all ranks, computed without communication."""
        return int(sum(self._trained[pack] for pack in self.pack_numbers(step, last) if pack is not None))

    def micro_batches(
        self, step: int, rank: int, last: int | None = None, shard: int = 0
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank in a step.

        Args:
            step: Optimizer step, from 0.
            rank: Data-parallel rank.
            last: Total number of packs; positions after it are filled with padding.
            shard: Sequence-parallel rank, which selects the shard of each row.
        """
        numbers = self.pack_numbers(step, last)
        costs = np.array([0.0 if number is None else self.costs[number] for number in numbers])
        for indices in assign_to_ranks(costs[None], self._batch_shape)[0, rank]:
            yield self.assemble([numbers[index] for index in indices], shard)

    def assemble(self, numbers: list[int | None], shard: int = 0) -> MicroBatch:
        """Concatenate packs and return one sequence-parallel shard of the row.

        Documents outside the shard are not read. The first token of a document is never a label.
        """
        shards = self._batch_shape.sequence_parallel_size
        members = [[] if number is None else self._packs.members(number).tolist() for number in numbers]
        paddings = self._paddings(members)
        # All arrays cover the whole row, [slots]; they are cut to the shard at the end. Padding has token id
        # 0: it forms documents of its own and is never a label, so the id is arbitrary.
        row_slots = sum(paddings) + sum(int(self._documents.lengths[each].sum()) for each in members)
        input_ids = np.zeros(row_slots, np.int64)
        shard_size = row_slots // shards
        local = slice(shard * shard_size, (shard + 1) * shard_size)
        trained, is_real = np.zeros(row_slots, np.bool_), np.zeros(row_slots, np.bool_)
        lengths: list[int] = []
        real: list[int] = []
        at = 0
        for pack, padding in zip(members, paddings, strict=True):
            first, sizes = at, []
            for member in pack:
                size = int(self._documents.lengths[member])
                if at < local.stop and at + size > local.start:
                    document = self._documents.document(member)
                    input_ids[at : at + size] = document.tokens
                    trained[at : at + size] = document.trained
                    trained[at] = False  # no earlier token of its document predicts it
                sizes.append(size)
                at += size
            sizes = [sum(sizes)] if self._sampler.cross_document_attention and sizes else sizes
            is_real[first:at] = True
            real += sizes
            lengths += sizes + _padding(padding)
            at += padding
        targets = np.flatnonzero(trained)
        # Labels are shifted here: slot i predicts token i + 1. A target belongs to the shard of the slot
        # before it, so a label at a shard's first slot goes to the previous rank and no exchange is needed.
        targets = targets[slice(*np.searchsorted(targets - 1, [local.start, local.stop]))]
        return MicroBatch(
            input_ids=input_ids[local],
            position_ids=np.concatenate([np.arange(size) for size in lengths])[local],
            document_lengths=tuple(lengths),
            label_positions=targets - 1 - local.start,
            labels=input_ids[targets],
            tokens=int(np.count_nonzero(is_real[local])),
            square_tokens=sum(size * size for size in real) / shards,
            real_lengths=tuple(real),
        )

    def _paddings(self, members: list[list[int]]) -> list[int]:
        """Return the padding slots after each pack of a row, given the documents of each pack."""
        tokens = [int(self._documents.lengths[each].sum()) for each in members]
        shape = self._batch_shape
        if shape.pads_packs:
            return [shape.max_length - size for size in tokens]
        # Every shard has at least one slot, also in the empty rows of the last step.
        slots = max(1, -(-sum(tokens) // shape.sequence_parallel_size)) * shape.sequence_parallel_size
        return [*[0] * (len(tokens) - 1), slots - sum(tokens)]

    def wait_factors(self) -> tuple[float, float]:
        """Return the wait factor of the first epoch without and with balancing; 1.0 means no rank waits."""
        shuffled = epoch_order(self.costs, self._sampler.seed, 0, self._batch_shape.global_batch_size, 1)
        before = wait_factor(self.costs, shuffled, self._batch_shape, balanced=False)
        return before, wait_factor(self.costs, self._order(0), self._batch_shape, balanced=True)

    def _pack_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._packs))
        return int(self._order(epoch)[index]) if self._sampler.shuffle else index

    def _order(self, epoch: int) -> Int64Array:
        if epoch not in self._orders:
            if len(self._orders) >= _ORDERS_KEPT:
                # The epoch that was computed first, since dictionaries keep the order of insertion.
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = epoch_order(
                self.costs,
                self._sampler.seed,
                epoch,
                self._batch_shape.global_batch_size,
                self._sampler.balance_window_steps,
            )
        return self._orders[epoch]


def _padding(slots: int) -> list[int]:
    whole, rest = divmod(slots, _PADDING_DOCUMENT_TOKENS)
    return [_PADDING_DOCUMENT_TOKENS] * whole + [rest] * (rest > 0)
