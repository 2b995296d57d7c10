"""Calibration: two memory and two time parameters per software stack, fitted to a few measured runs.

They capture what the formulas cannot derive from model sizes: memory that libraries and the allocator hold
in addition to tensors (an offset), activation copies that layers and loss save (a factor), kernel efficiency,
and the kernel launch overhead or, for several nodes, the network bandwidth. The fits are regularized: without
measurements they return the default parameters.
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
"""Required headroom as a fraction of the need; 90 % of published measurements are predicted within it."""
TOLERANCE = 0.015
"""Measurement error of published peaks: none exceeds the memory of its GPU by more than this fraction."""
Seconds = npt.NDArray[np.float64]
_EFFICIENCIES = 1.02 ** np.arange(-45.0, 31.0)
_OVERHEADS = 1.15 ** np.arange(-10.0, 26.0)
_EFFICIENCY_PRIOR_STD = 0.35
_LAUNCH_PRIOR_STD = 0.3
_NETWORK_PRIOR_STD = 1.5
_TIME_NOISE = 0.08
_FACTORS = tuple(1.02**step for step in range(-48, 41))
_REACH = 2.0
"""Largest distance of a fitted offset from its prior mean, in standard deviations."""
_NOISE = 0.03
"""Relative error of published memory measurements (units and sampling; 3 to 7 %)."""


@dataclass(frozen=True)
class MemoryParams:
    """Memory parameters of a software stack.

    Attributes:
        offset_bytes: Memory used in addition to all parts, independent of the job.
        activation_factor: Factor on activations, logits and the activations of the recomputed layer.
    """

    offset_bytes: float = 0.0
    activation_factor: float = 1.0

    def peak(self, memory: GpuMemory) -> float:
        """Return the peak memory that the allocator reserves, in bytes."""
        forward = self._forward(memory) + self.activation_factor * memory.fragmentation
        return self._fixed(memory) + max(forward, memory.step) + memory.retained

    def required(self, memory: GpuMemory) -> float:
        """Return the peak memory without allocator fragmentation, in bytes."""
        return self._fixed(memory) + max(self._forward(memory), memory.step)

    def needed(self, memory: GpuMemory) -> float:
        """Return the memory that has to fit, in bytes: under pressure half of the fragmentation is freed."""
        return (self.required(memory) + self.peak(memory)) / 2

    def _fixed(self, memory: GpuMemory) -> float:
        return self.offset_bytes + memory.states + memory.gathered_params

    def _forward(self, memory: GpuMemory) -> float:
        largest = max(
            self.activation_factor * memory.logits,
            self.activation_factor * memory.layer + memory.quantization,
        )
        return self.activation_factor * memory.activations + largest


@dataclass(frozen=True)
class PriorStd:
    """Standard deviations of the prior of `MemoryParams`.

    Attributes:
        offset_bytes: Standard deviation of the offset.
        log_factor: Standard deviation of the factor's logarithm.
    """

    offset_bytes: float = 3 * GIB
    log_factor: float = 0.06


def fit_memory(
    rows: Sequence[tuple[GpuMemory, float]],
    start: MemoryParams = MemoryParams(),
    prior_std: PriorStd = PriorStd(),
) -> MemoryParams:
    """Fit memory parameters to measured peaks by regularized least squares of relative errors.

    Args:
        rows: Predicted memory by part, and the measured peak in bytes.
        start: Prior mean; the result if there are no rows.
        prior_std: Standard deviations of the prior.
    """
    best, best_cost = start, math.inf
    for factor in _FACTORS:
        deviation = (math.log(factor / start.activation_factor) / prior_std.log_factor) ** 2
        plain = MemoryParams(0.0, factor)
        residuals = [(measured - plain.peak(memory), _NOISE * measured) for memory, measured in rows]
        offset = _posterior_mean(residuals, start.offset_bytes, prior_std.offset_bytes)
        # Libraries use a few GiB; a larger fitted offset means that the formulas do not describe these runs.
        reach = _REACH * prior_std.offset_bytes
        offset = min(max(offset, start.offset_bytes - reach), start.offset_bytes + reach)
        cost = deviation + ((offset - start.offset_bytes) / prior_std.offset_bytes) ** 2
        cost += sum(_huber((offset - gap) / noise) for gap, noise in residuals)
        if cost < best_cost:
            best, best_cost = MemoryParams(offset, factor), cost
    return best


def predicted_seconds(steps: MicroSteps, spans_nodes: bool) -> Seconds:
    """Return step times on the grid of parameters that `fit_time` searches.

    Args:
        steps: Uncalibrated seconds of a step by part.
        spans_nodes: Whether the second parameter is the network factor instead of the launch factor.

    Returns:
        Seconds, shape (efficiencies, factors).
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
    """Return parameters with the network factor (several nodes) or the launch factor (one node) set."""
    if spans_nodes:
        return TimeParams(efficiency, start.launch_factor, factor)
    return TimeParams(efficiency, factor, start.network_factor)


def fit_time(
    rows: Sequence[tuple[Seconds, float]],
    spans_nodes: bool,
    start: TimeParams = TimeParams(),
    prior_std: float = 1.0,
) -> TimeParams:
    """Fit time parameters to measured step times by regularized least squares of log ratios.

    Args:
        rows: Arrays from `predicted_seconds`, and the measured seconds.
        spans_nodes: As for `predicted_seconds`.
        start: Prior mean; the result if there are no rows.
        prior_std: Scale of the prior, relative to the differences between software stacks.
    """
    begin = start.network_factor if spans_nodes else start.launch_factor
    wide = prior_std * (_NETWORK_PRIOR_STD if spans_nodes else _LAUNCH_PRIOR_STD)
    cost = (np.log(_EFFICIENCIES / start.efficiency) / (prior_std * _EFFICIENCY_PRIOR_STD))[:, None] ** 2
    cost = cost + (np.log(_OVERHEADS / begin) / wide)[None, :] ** 2
    for seconds, measured in rows:
        deviation = np.abs(np.log(seconds / measured)) / _TIME_NOISE
        cost = cost + np.where(deviation <= 1.5, deviation**2, 3.0 * deviation - 2.25)
    row, column = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return _time_params(float(_EFFICIENCIES[row]), float(_OVERHEADS[column]), spans_nodes, start)


def _posterior_mean(residuals: Iterable[tuple[float, float]], start: float, prior_std: float) -> float:
    """Return the mean of a prior and of (value, standard deviation) pairs, weighted by inverse variance."""
    weights = 1.0 / prior_std**2
    total = start * weights
    for value, noise in residuals:
        weights += 1.0 / noise**2
        total += value / noise**2
    return total / weights


def _huber(deviations: float) -> float:
    """Return the Huber loss with threshold 2, so that a single outlier has little weight."""
    size = abs(deviations)
    return size**2 if size <= 2 else 4 * size - 4


def verdict(needed_bytes: float, capacity_bytes: float, margin: float = MARGIN) -> Verdict:
    """Return whether a predicted need fits: with headroom, without ("tight"), or not.

    Args:
        needed_bytes: From `MemoryParams.needed`.
        capacity_bytes: Memory available to a process.
        margin: Required headroom as a fraction of the need.
    """
    if needed_bytes > capacity_bytes * (1 + TOLERANCE):
        return "does not fit"
    return "fits" if needed_bytes * (1 + margin) <= capacity_bytes else "tight"
