"""The order of packs, and their places in a step, so that workers that wait for one another work alike.

A step lasts as long as its slowest worker. Packs cost alike in all but attention, which grows with the
squares of document lengths. Inside a window of steps, packs of like cost share a step; which packs form a
step depends on the seed and the global batch alone. Inside a step, packs are dealt to workers so that those
that wait for one another have alike: under ZeRO-2 and ZeRO-3, which reduce gradients in each micro-step, in
each micro-step; otherwise over the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """Sizes that lay out a step: packs in it, workers that share it, packs in one forward pass.

    Attributes:
        max_length: Tokens in a pack.
        global_batch_size: Packs in a step.
        micro_batch_size: Packs in one forward pass of a worker.
        data_parallel_size: Workers with packs of their own.
        waits_each_micro_step: Whether workers wait for one another in every micro-step (ZeRO-2 and ZeRO-3)
            or once a step.
        sequence_parallel_size: Workers that share one row of packs.
    """

    max_length: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    waits_each_micro_step: bool = True
    sequence_parallel_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one worker in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def epoch_order(
    costs: Float64Array, seed: int, epoch: int, global_batch_size: int, window_steps: int
) -> Int64Array:
    """Return the packs of an epoch in the order in which steps take them.

    Args:
        costs: Cost of each pack, shape [packs].
        seed: Decides the order, together with the epoch.
        epoch: Its number, from 0; epochs follow one another without a gap, also in the middle of a step.
        global_batch_size: Packs in a step.
        window_steps: Steps among which packs of like cost come together; 1 leaves the order to chance.

    Returns:
        Every pack once, shape [packs].
    """
    # RandomState's stream is frozen for good (NEP 19), so a run that goes on under a later numpy goes on
    # alike.
    generator = np.random.RandomState([seed, epoch])
    order: Int64Array = generator.permutation(len(costs)).astype(np.int64)
    head = -epoch * len(costs) % global_batch_size  # they fill the step that the epoch before began
    steps = max(0, len(costs) - head) // global_batch_size
    if window_steps == 1 or steps < 2:
        return order
    body = order[head : head + steps * global_batch_size]
    for first in range(0, steps, window_steps):
        window = body[first * global_batch_size : (first + window_steps) * global_batch_size]
        alike = window[np.argsort(costs[window], kind="stable")].reshape(-1, global_batch_size)
        window[:] = alike[generator.permutation(len(alike))].ravel()
    return order


def deal(costs: Float64Array, geometry: Geometry) -> Int64Array:
    """Place the packs of steps so that workers that wait for one another have alike to do.

    Args:
        costs: Costs of the packs of each step, shape [steps, global_batch_size].
        geometry: The step.

    Returns:
        Which pack of its step stands where, shape [steps, workers, micro-batches, micro_batch_size].
    """
    steps, (workers, size) = len(costs), (geometry.data_parallel_size, geometry.micro_batch_size)
    order = np.argsort(-costs, axis=1, kind="stable")
    chunks = geometry.micro_batches if geometry.waits_each_micro_step else 1
    order = order.reshape(steps * chunks, -1, workers)  # [group that waits, round, one pack for each worker]
    falling = np.take_along_axis(costs, order.reshape(steps, -1), axis=1).reshape(order.shape)
    loads = np.zeros((len(order), workers))
    placed = np.empty_like(order)
    for number in range(
        order.shape[1]
    ):  # the largest of a round goes to the worker that has the least so far
        least_first = np.argsort(loads, axis=1, kind="stable")
        np.put_along_axis(placed[:, number], least_first, order[:, number], axis=1)
        added = np.empty_like(loads)
        np.put_along_axis(added, least_first, falling[:, number], axis=1)
        loads += added
    if geometry.waits_each_micro_step:
        by_worker = placed.reshape(steps, chunks, size, workers).transpose(0, 3, 1, 2)
    else:
        by_worker = placed.reshape(steps, -1, size, workers).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(by_worker)


def wait_factor(costs: Float64Array, order: Int64Array, geometry: Geometry, dealt: bool) -> float:
    """Return how much longer steps take than they would if all workers had alike to do.

    Args:
        costs: Cost of each pack, shape [packs].
        order: Packs in the order in which steps take them; packs beyond the last whole step are left out.
        geometry: The step.
        dealt: Whether packs are dealt by cost, or stand in the order given.

    Returns:
        The sum of the slowest workers' costs over the sum of the mean costs; 1 where nobody waits.
    """
    size = geometry.global_batch_size
    steps = len(order) // size
    if steps == 0:
        return 1.0
    slowest = mean = 0.0
    for part in _parts(costs[order[: steps * size]].reshape(steps, size)):
        shape = (len(part), geometry.data_parallel_size, geometry.micro_batches, geometry.micro_batch_size)
        if dealt:
            placed = np.take_along_axis(part, deal(part, geometry).reshape(len(part), -1), axis=1)
        else:
            placed = part.reshape(shape[0], shape[2], shape[1], shape[3]).swapaxes(1, 2)
        work = placed.reshape(shape).sum(axis=3)
        work = work if geometry.waits_each_micro_step else work.sum(axis=2, keepdims=True)
        slowest += float(work.max(axis=1).sum())
        mean += float(work.mean(axis=1).sum())
    return slowest / mean


def _parts(costs: Float64Array) -> Iterator[Float64Array]:
    """Yield steps in portions, so that memory stays bounded."""
    portion = max(1, 2**20 // costs.shape[1])
    for start in range(0, len(costs), portion):
        yield costs[start : start + portion]
