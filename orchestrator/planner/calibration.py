"""Two constants a software stack for memory and two for time, fitted to a few measured steps.

What formulas of sizes cannot know is the same for all that one stack trains: what libraries and allocator
hold beside the tensors (an offset), how many copies its layers and its loss keep (a factor on activations),
how well its kernels use a GPU (an efficiency), and how fast its hosts launch them, or, between nodes, its
network is. Fits are regularised: without measurements the constants are those of no calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from orchestrator.planner.memory import GIB, GpuMemory
from orchestrator.planner.step_time import MicroSteps, TimeParams

Verdict = Literal["fits", "tight", "does not fit"]
MARGIN = 0.10
"""Nine in ten published rows are predicted within it: what fits has it to spare."""
TOLERANCE = 0.015
"""Nothing published has run with more than this above what its GPU has: less is a question of readings."""
Seconds = npt.NDArray[np.float64]
_EFFICIENCIES = 1.02 ** np.arange(-45.0, 31.0)
_OVERHEADS = 1.15 ** np.arange(-10.0, 26.0)
_EFFICIENCY_SPREAD = 0.35
_LAUNCH_SPREAD = 0.3
_NETWORK_SPREAD = 1.5
_TIME_NOISE = 0.08
_FACTORS = tuple(1.02**step for step in range(-48, 41))
_REACH = 2.0
"""How far an offset may lie from where a fit begins, in standard deviations."""
_NOISE = 0.03
"""Relative error that measured memory has in itself: its units, and how pages read it (3 to 7 %)."""


@dataclass(frozen=True)
class MemoryParams:
    """What a stack's memory differs by.

    Attributes:
        offset_bytes: Held beside all parts, whatever is trained.
        activation_factor: On activations, logits and a layer's own.
    """

    offset_bytes: float = 0.0
    activation_factor: float = 1.0

    def peak(self, memory: GpuMemory) -> float:
        """Return what a stack with these constants has reserved at its peak, in bytes."""
        forward = self._forward(memory) + self.activation_factor * memory.fragmentation
        return self._fixed(memory) + max(forward, memory.step) + memory.retained

    def required(self, memory: GpuMemory) -> float:
        """Return what it needs with an allocator that wastes nothing, in bytes."""
        return self._fixed(memory) + max(self._forward(memory), memory.step)

    def needed(self, memory: GpuMemory) -> float:
        """Return what has to fit, in bytes: an allocator that runs short gets back half of what it wasted."""
        return (self.required(memory) + self.peak(memory)) / 2

    def _fixed(self, memory: GpuMemory) -> float:
        return self.offset_bytes + memory.states + memory.window

    def _forward(self, memory: GpuMemory) -> float:
        largest = max(
            self.activation_factor * memory.logits,
            self.activation_factor * memory.layer + memory.quantization,
        )
        return self.activation_factor * memory.activations + largest


@dataclass(frozen=True)
class PriorStd:
    """How far constants may lie from where a fit begins.

    Attributes:
        offset_bytes: Standard deviation of the offset.
        log_factor: Standard deviation of the factor's logarithm.
    """

    offset_bytes: float = 3 * GIB
    log_factor: float = 0.06


def fit_memory(
    rows: Sequence[tuple[GpuMemory, float]],
    start: MemoryParams = MemoryParams(),
    spread: PriorStd = PriorStd(),
) -> MemoryParams:
    """Return the constants that fit measured peaks best, relative errors squared.

    Args:
        rows: Predicted parts and the measured peak in bytes.
        start: Constants without any row.
        spread: How far from them the constants may lie.
    """
    best, best_cost = start, math.inf
    for factor in _FACTORS:
        away = (math.log(factor / start.activation_factor) / spread.log_factor) ** 2
        plain = MemoryParams(0.0, factor)
        wanted = [(measured - plain.peak(memory), _NOISE * measured) for memory, measured in rows]
        offset = _ridge(wanted, start.offset_bytes, spread.offset_bytes)
        # Libraries hold a few GiB: what a fit asks for beyond says that formulas do not describe these runs.
        reach = _REACH * spread.offset_bytes
        offset = min(max(offset, start.offset_bytes - reach), start.offset_bytes + reach)
        cost = away + ((offset - start.offset_bytes) / spread.offset_bytes) ** 2
        cost += sum(_bounded((offset - gap) / noise) for gap, noise in wanted)
        if cost < best_cost:
            best, best_cost = MemoryParams(offset, factor), cost
    return best


def predicted_seconds(steps: MicroSteps, spans_nodes: bool) -> Seconds:
    """Return a step's seconds for each pair of constants that a fit tries.

    Args:
        steps: A step's parts.
        spans_nodes: Whether the stack's second constant is that of the network, or of launches.

    Returns:
        An array of efficiencies by factors.
    """
    return np.array(
        [
            [steps.step(_time_params(efficiency, factor, spans_nodes)).total for factor in _OVERHEADS]
            for efficiency in _EFFICIENCIES
        ]
    )


def _time_params(
    efficiency: float, factor: float, spans_nodes: bool, start: TimeParams = TimeParams()
) -> TimeParams:
    """Return a stack's constants: its second is that of its network, or of its launches."""
    if spans_nodes:
        return TimeParams(efficiency, start.launch_factor, factor)
    return TimeParams(efficiency, factor, start.network_factor)


def fit_time(
    rows: Sequence[tuple[Seconds, float]],
    spans_nodes: bool,
    start: TimeParams = TimeParams(),
    spread: float = 1.0,
) -> TimeParams:
    """Return the constants that fit measured seconds of a step best, ratios squared.

    Args:
        rows: From `predicted_seconds`, and what was measured.
        spans_nodes: As there.
        start: Constants without any row.
        spread: How far from them the constants may lie, in units of what stacks differ by.
    """
    begin = start.network_factor if spans_nodes else start.launch_factor
    wide = spread * (_NETWORK_SPREAD if spans_nodes else _LAUNCH_SPREAD)
    cost = (np.log(_EFFICIENCIES / start.efficiency) / (spread * _EFFICIENCY_SPREAD))[:, None] ** 2
    cost = cost + (np.log(_OVERHEADS / begin) / wide)[None, :] ** 2
    for seconds, measured in rows:
        away = np.abs(np.log(seconds / measured)) / _TIME_NOISE
        cost = cost + np.where(away <= 1.5, away**2, 3.0 * away - 2.25)
    row, column = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return _time_params(float(_EFFICIENCIES[row]), float(_OVERHEADS[column]), spans_nodes, start)


def _ridge(wanted: Iterable[tuple[float, float]], start: float, spread: float) -> float:
    """Return the mean of values with their deviations, and of where it starts, weighted by certainty."""
    weights = 1.0 / spread**2
    total = start * weights
    for value, noise in wanted:
        weights += 1.0 / noise**2
        total += value / noise**2
    return total / weights


def _bounded(deviations: float) -> float:
    """Return a squared deviation that grows slowly beyond two (Huber's): one odd row decides little."""
    size = abs(deviations)
    return size**2 if size <= 2 else 4 * size - 4


def verdict(needed_bytes: float, capacity_bytes: float, margin: float = MARGIN) -> Verdict:
    """Return whether a predicted need fits: with a margin, without one, or not.

    Args:
        needed_bytes: From `MemoryParams.needed`.
        capacity_bytes: What a process can have.
        margin: Part of the need that is to be spare.
    """
    if needed_bytes > capacity_bytes * (1 + TOLERANCE):
        return "does not fit"
    return "fits" if needed_bytes * (1 + margin) <= capacity_bytes else "tight"
