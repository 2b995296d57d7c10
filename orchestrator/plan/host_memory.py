"""Host memory and room on a disk that a worker needs for what is offloaded: told before anything is started.

The bytes are those of DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs` in
deepspeed/runtime/zero/stage_1_and_2.py and `estimate_zero3_model_states_mem_needs` in stage3.py, 0.19), which
are given for a node and hold for each worker as its share; only frozen parameters, which they do not know,
have no optimizer state here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FACTOR = 1.5
"""DeepSpeed's `additional_buffer_factor`: buffers and fragmentation on top of the states themselves."""
STATE_BYTES = 16
"""Of a trained parameter: fp32 weight, fp32 gradient and two fp32 moments."""
_FP32_BYTES = 4


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, weights that are tied counted once.

    Attributes:
        total: All of them.
        trained: Those that have a gradient.
        largest: Those of the largest weight.
    """

    total: int
    trained: int
    largest: int = 0


@dataclass(frozen=True)
class HostMemory:
    """Bytes that one worker needs in its node's memory for what is offloaded.

    Attributes:
        optimizer: Optimizer state, or the buffers through which it passes to and from a disk.
        parameters: Partitioned parameters, or their buffers.
        building: The whole model, which each worker builds in host memory below ZeRO-3; 0 elsewhere.
    """

    optimizer: int = 0
    parameters: int = 0
    building: int = 0

    @property
    def total(self) -> int:
        """What the worker reserves: 0 where nothing is offloaded."""
        if not self.optimizer + self.parameters:
            return 0
        # The model has moved to the device when the state is made.
        return int(FACTOR * max(self.optimizer + self.parameters, self.building))


def host_memory(ds_config: Mapping[str, Any], count: ParameterCount, workers: int) -> HostMemory:
    """Return the host memory that one worker needs for what a DeepSpeed configuration offloads.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed.render` returns it.
        count: Parameters of the model, with its adapters.
        workers: Workers among whom the state is partitioned.
    """
    zero, weight_bytes = ds_config["zero_optimization"], _weight_bytes(ds_config)
    trained, held, largest = (-(-n // workers) for n in (count.trained, count.total, count.largest))
    return HostMemory(
        optimizer=_optimizer_bytes(zero, trained, largest),
        parameters=_parameter_bytes(zero, held, largest, weight_bytes),
        building=0 if zero["stage"] == 3 else weight_bytes * count.total,
    )


def disk_bytes(ds_config: Mapping[str, Any], count: ParameterCount, workers: int) -> int:
    """Return what one worker writes to its node's disk at most; what is small stays in memory.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed.render` returns it.
        count: Parameters of the model, with its adapters.
        workers: Workers among whom the state is partitioned.
    """
    zero, found = ds_config["zero_optimization"], 0
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        found += STATE_BYTES * -(-count.trained // workers)
    if zero.get("offload_param", {}).get("device") == "nvme":
        found += _weight_bytes(ds_config) * -(-count.total // workers)
    return found


def _weight_bytes(ds_config: Mapping[str, Any]) -> int:
    return 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else _FP32_BYTES


def _optimizer_bytes(zero: Mapping[str, Any], trained: int, largest: int) -> int:
    section = zero.get("offload_optimizer", {})
    if section.get("device") == "cpu":
        return STATE_BYTES * trained
    if section.get("device") == "nvme":  # one sub-group at a time, in buffers of its size
        return _FP32_BYTES * int(section["buffer_count"]) * _sub_group(zero, trained, largest)
    return 0


def _parameter_bytes(zero: Mapping[str, Any], held: int, largest: int, weight_bytes: int) -> int:
    section = zero.get("offload_param", {})
    if section.get("device") == "cpu":
        return weight_bytes * held
    if section.get("device") == "nvme":
        read = int(section["buffer_count"]) * int(section["buffer_size"])
        written = _sub_group(zero, held, largest)
        return weight_bytes * (read + written + min(held, int(section["max_in_cpu"])))
    return 0


def _sub_group(zero: Mapping[str, Any], share: int, largest: int) -> int:
    """Return the parameters of the largest sub-group; it ends with the weight that fills it."""
    return min(share, int(zero["sub_group_size"]) + largest)
