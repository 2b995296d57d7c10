"""Predicts host memory and disk space that a worker needs for offloaded state.

The formulas are those of DeepSpeed's estimators (`estimate_zero2_model_states_mem_needs` in
deepspeed/runtime/zero/stage_1_and_2.py and `estimate_zero3_model_states_mem_needs` in stage3.py, 0.19), which
are per node; here each worker has its share, and frozen parameters have no optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.arch.parameters import ParameterCount

DsConfig = Mapping[str, Any]
"""A DeepSpeed configuration, as `orchestrator.parallel.deepspeed_config.render` returns it."""
OffloadDevice = Literal["none", "cpu", "nvme"]
FACTOR = 1.5
"""DeepSpeed's `additional_buffer_factor`: buffers and fragmentation in addition to the state."""
STATE_BYTES = 16
"""Bytes per trained parameter: fp32 weight, fp32 gradient and two fp32 moments."""
_FP32_BYTES = 4


@dataclass(frozen=True)
class Offload:
    """Offload devices, and buffer sizes of state on NVMe.

    Attributes:
        optimizer: Device of optimizer state and fp32 copies.
        parameters: Device of partitioned parameters.
        sub_group: ZeRO-3 sub-group size in parameters (`sub_group_size`).
        sub_groups_in_memory: Number of sub-group sized buffers for optimizer state on NVMe.
        parameters_in_memory: Number of parameters in host memory, buffered or resident, with NVMe.
    """

    optimizer: OffloadDevice = "none"
    parameters: OffloadDevice = "none"
    sub_group: int = 0
    sub_groups_in_memory: int = 0
    parameters_in_memory: int = 0

    @classmethod
    def from_ds_config(cls, ds_config: DsConfig) -> Offload:
        """Return the offload settings of a DeepSpeed configuration."""
        zero = ds_config["zero_optimization"]
        optimizer, parameters = zero.get("offload_optimizer", {}), zero.get("offload_param", {})
        read = int(parameters.get("buffer_count", 0)) * int(parameters.get("buffer_size", 0))
        return cls(
            optimizer=optimizer.get("device", "none"),
            parameters=parameters.get("device", "none"),
            sub_group=int(zero.get("sub_group_size", 0)),
            sub_groups_in_memory=int(optimizer.get("buffer_count", 0)),
            parameters_in_memory=read + int(parameters.get("max_in_cpu", 0)),
        )


NO_OFFLOAD = Offload()


@dataclass(frozen=True)
class HostMemory:
    """Host memory of one worker in bytes.

    Attributes:
        optimizer: Optimizer state, or its NVMe buffers.
        parameters: Partitioned parameters, or their NVMe buffers.
        building: The full model, which each worker builds in host memory below ZeRO-3; else 0.
        activations: Checkpointed activations.
    """

    optimizer: int = 0
    parameters: int = 0
    building: int = 0
    activations: int = 0

    @property
    def held(self) -> int:
        """Steady-state bytes during training, without `FACTOR`."""
        return self.optimizer + self.parameters + self.activations

    @property
    def total(self) -> int:
        """Bytes to reserve for the worker; 0 without offload."""
        states = self.optimizer + self.parameters
        # The model is on the device before optimizer state is created, so the two do not add up.
        return (int(FACTOR * max(states, self.building)) if states else 0) + self.activations


def host_memory(ds_config: DsConfig, count: ParameterCount, workers: int) -> HostMemory:
    """Return the host memory of one worker for a DeepSpeed configuration.

    Args:
        ds_config: The job's DeepSpeed configuration.
        count: Parameter counts of the model with adapters.
        workers: Number of workers that partition the state.
    """
    stage = ds_config["zero_optimization"]["stage"]
    return offloaded(Offload.from_ds_config(ds_config), stage, _weight_bytes(ds_config), count, workers)


def offloaded(
    offload: Offload, stage: int, weight_bytes: int, count: ParameterCount, workers: int
) -> HostMemory:
    """Return the host memory of one worker for model state.

    Args:
        offload: Offload settings.
        stage: ZeRO stage.
        weight_bytes: Bytes per parameter.
        count: Parameter counts of the model with adapters.
        workers: Number of workers that partition the state.
    """
    trained, held, largest = (-(-n // workers) for n in (count.trained, count.total, count.largest))
    return HostMemory(
        optimizer=_optimizer_bytes(offload, trained, largest),
        parameters=_parameter_bytes(offload, held, largest, weight_bytes),
        building=0 if stage == 3 else weight_bytes * count.total,
    )


def disk_bytes(ds_config: DsConfig, count: ParameterCount, workers: int) -> int:
    """Return the maximum bytes that one worker writes to NVMe; small tensors stay in memory.

    Args:
        ds_config: The job's DeepSpeed configuration.
        count: Parameter counts of the model with adapters.
        workers: Number of workers that partition the state.
    """
    offload, total = Offload.from_ds_config(ds_config), 0
    if offload.optimizer == "nvme":
        total += STATE_BYTES * -(-count.trained // workers)
    if offload.parameters == "nvme":
        total += _weight_bytes(ds_config) * -(-count.total // workers)
    return total


def _weight_bytes(ds_config: DsConfig) -> int:
    return 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else _FP32_BYTES


def _optimizer_bytes(offload: Offload, trained: int, largest: int) -> int:
    if offload.optimizer == "nvme":  # one sub-group at a time, in buffers of sub-group size
        return _FP32_BYTES * offload.sub_groups_in_memory * _sub_group(offload, trained, largest)
    return STATE_BYTES * trained if offload.optimizer == "cpu" else 0


def _parameter_bytes(offload: Offload, held: int, largest: int, weight_bytes: int) -> int:
    if offload.parameters == "nvme":
        return weight_bytes * (offload.parameters_in_memory + _sub_group(offload, held, largest))
    return weight_bytes * held if offload.parameters == "cpu" else 0


def _sub_group(offload: Offload, share: int, largest: int) -> int:
    """Return the size of the largest sub-group, which ends after the weight that exceeds the limit."""
    return min(share, offload.sub_group + largest)
