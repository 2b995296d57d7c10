"""Order packs and assign them to data-parallel ranks so that ranks that synchronize have equal work.

A step lasts as long as its slowest rank. Packs of equal size differ only in attention, whose cost grows with
the squared document lengths; packs that are not padded (`packing: none`) also differ in their slots. Within
`balance_window_steps` steps, packs of similar cost are grouped into the same step; which packs form a step
depends on the seed and the global batch size only. Within a step, packs are assigned to ranks so that the
cost between two synchronizations is equal: for each micro-step under ZeRO-2 and ZeRO-3, which reduce
gradients in every backward pass, and for the whole step otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BatchShape:
    """How the packs of a global batch are divided into micro-batches and ranks.

    Attributes:
        max_length: Slots in a pack, at most.
        global_batch_size: Packs in an optimizer step.
        micro_batch_size: Packs in one forward pass of a rank.
        data_parallel_size: Data-parallel ranks.
        sync_every_micro_step: Whether ranks synchronize in every micro-step (ZeRO-2 and ZeRO-3) or once a
            step.
        sequence_parallel_size: Ranks that share one row of packs.
        pads_packs: Whether every pack is padded to max_length slots; otherwise packs lie end to end.
    """

    max_length: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    sync_every_micro_step: bool = True
    sequence_parallel_size: int = 1
    pads_packs: bool = True

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def epoch_order(
    costs: Float64Array, seed: int, epoch: int, global_batch_size: int, balance_window_steps: int
) -> Int64Array:
    """Return the pack numbers of an epoch in training order.

    Args:
        costs: Cost of each pack, shape [packs].
        seed: Seed of the shuffle, combined with the epoch.
        epoch: Epoch number, from 0. Epochs follow one another without a gap, also in the middle of a step.
        global_batch_size: Packs in a step.
        balance_window_steps: Steps within which packs are sorted by cost; 1 shuffles only.

    Returns:
        Every pack number once, shape [packs].
    """
    # RandomState's stream is frozen for good (NEP 19), so a run that resumes under a later numpy draws the
    # same order.
    generator = np.random.RandomState([seed, epoch])
    order: Int64Array = generator.permutation(len(costs)).astype(np.int64)
    head = -epoch * len(costs) % global_batch_size  # packs that complete the last step of the previous epoch
    steps = max(0, len(costs) - head) // global_batch_size
    if balance_window_steps == 1 or steps < 2:
        return order
    body = order[head : head + steps * global_batch_size]
    for first in range(0, steps, balance_window_steps):
        window = body[first * global_batch_size : (first + balance_window_steps) * global_batch_size]
        # Sort by cost and cut into steps, then shuffle the steps: short and long steps alternate at random.
        by_cost = window[np.argsort(costs[window], kind="stable")].reshape(-1, global_batch_size)
        window[:] = by_cost[generator.permutation(len(by_cost))].ravel()
    return order


def assign_to_ranks(costs: Float64Array, batch_shape: BatchShape) -> Int64Array:
    """Assign the packs of each step to ranks and micro-batches, with equal cost between synchronizations.

    Greedy: the packs of a step are sorted by falling cost and handed out in rounds of one pack per rank; in
    each round the most expensive pack goes to the rank with the lowest cost so far.

    Args:
        costs: Cost of each pack of each step, shape [steps, global_batch_size].
        batch_shape: How a step is divided.

    Returns:
        Index of each pack in its step, shape [steps, ranks, gradient_accumulation_steps, micro_batch_size].
    """
    steps, (ranks, size) = len(costs), (batch_shape.data_parallel_size, batch_shape.micro_batch_size)
    order = np.argsort(-costs, axis=1, kind="stable")
    groups = batch_shape.gradient_accumulation_steps if batch_shape.sync_every_micro_step else 1
    # A group is what runs between two synchronizations: [steps * groups, rounds, ranks].
    order = order.reshape(steps * groups, -1, ranks)
    falling = np.take_along_axis(costs, order.reshape(steps, -1), axis=1).reshape(order.shape)
    loads = np.zeros((len(order), ranks))  # cost of each rank so far, [steps * groups, ranks]
    assigned = np.empty_like(order)
    for number in range(order.shape[1]):
        least_first = np.argsort(loads, axis=1, kind="stable")
        np.put_along_axis(assigned[:, number], least_first, order[:, number], axis=1)
        added = np.empty_like(loads)
        np.put_along_axis(added, least_first, falling[:, number], axis=1)
        loads += added
    # `size` consecutive rounds make one micro-batch of every rank: [steps, micro-batches, size, ranks].
    by_rank = assigned.reshape(steps, -1, size, ranks).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(by_rank)


def wait_factor(costs: Float64Array, order: Int64Array, batch_shape: BatchShape, balanced: bool) -> float:
    """Return the time of steps relative to perfectly balanced ranks.

    Args:
        costs: Cost of each pack, shape [packs].
        order: Pack numbers in training order; packs after the last full step are ignored.
        batch_shape: How a step is divided.
        balanced: Whether `assign_to_ranks` assigns the packs; otherwise they are assigned in the given order.

    Returns:
        Sum of the slowest ranks' costs divided by the sum of the mean costs; 1.0 if no rank waits.
    """
    size = batch_shape.global_batch_size
    steps = len(order) // size
    if steps == 0:
        return 1.0
    ranks, accumulation = batch_shape.data_parallel_size, batch_shape.gradient_accumulation_steps
    slowest = mean = 0.0
    for chunk in _chunks(costs[order[: steps * size]].reshape(steps, size)):
        if balanced:
            assigned = np.take_along_axis(
                chunk, assign_to_ranks(chunk, batch_shape).reshape(len(chunk), -1), axis=1
            )
        else:  # consecutive micro-batches go to consecutive ranks
            assigned = chunk.reshape(len(chunk), accumulation, ranks, batch_shape.micro_batch_size).swapaxes(
                1, 2
            )
        work = assigned.reshape(len(chunk), ranks, accumulation, batch_shape.micro_batch_size).sum(axis=3)
        work = work if batch_shape.sync_every_micro_step else work.sum(axis=2, keepdims=True)
        slowest += float(work.max(axis=1).sum())
        mean += float(work.mean(axis=1).sum())
    return slowest / mean


def _chunks(costs: Float64Array) -> Iterator[Float64Array]:
    """Yield consecutive steps, about 2**20 packs at a time, to bound the memory of temporary arrays."""
    steps = max(1, 2**20 // costs.shape[1])
    for start in range(0, len(costs), steps):
        yield costs[start : start + steps]
