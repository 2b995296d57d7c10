"""Host memory and room on a disk that a worker needs for what is offloaded: told before anything is started.

The bytes are those of DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs` in
deepspeed/runtime/zero/stage_1_and_2.py and `estimate_zero3_model_states_mem_needs` in stage3.py, 0.19), which
are given for a node and hold for each worker as its share; only frozen parameters, which they do not know,
have no optimizer state here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.arch.parameters import ParameterCount

Place = Literal["none", "cpu", "nvme"]
FACTOR = 1.5
"""DeepSpeed's `additional_buffer_factor`: buffers and fragmentation on top of the states themselves."""
STATE_BYTES = 16
"""Of a trained parameter: fp32 weight, fp32 gradient and two fp32 moments."""
_FP32_BYTES = 4


@dataclass(frozen=True)
class Offload:
    """Where states are, and through how much memory those on a disk pass.

    Attributes:
        optimizer: The optimizer's state and fp32 copies.
        parameters: The partitioned parameters.
        sub_group: Parameters that ZeRO-3 steps at once.
        sub_groups_in_memory: Of those on a disk, how many tensors of a sub-group's size are in memory.
        parameters_in_memory: Of those on a disk, how many parameters are in memory, in buffers or for good.
    """

    optimizer: Place = "none"
    parameters: Place = "none"
    sub_group: int = 0
    sub_groups_in_memory: int = 0
    parameters_in_memory: int = 0

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> Offload:
        """Return what a configuration as of `orchestrator.parallel.deepspeed_config.render` offloads."""
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
    """Bytes that one worker needs in its node's memory for what is offloaded.

    Attributes:
        optimizer: Optimizer state, or the buffers through which it passes to and from a disk.
        parameters: Partitioned parameters, or their buffers.
        building: The whole model, which each worker builds in host memory below ZeRO-3; 0 elsewhere.
        activations: What checkpointing keeps.
    """

    optimizer: int = 0
    parameters: int = 0
    building: int = 0
    activations: int = 0

    @property
    def held(self) -> int:
        """What is there while it trains, without an allowance for buffers."""
        return self.optimizer + self.parameters + self.activations

    @property
    def total(self) -> int:
        """What the worker reserves: 0 where nothing is offloaded."""
        states = self.optimizer + self.parameters
        # The model has moved to the device when the state is made.
        return (int(FACTOR * max(states, self.building)) if states else 0) + self.activations


def host_memory(ds_config: Mapping[str, Any], count: ParameterCount, workers: int) -> HostMemory:
    """Return the host memory that one worker needs for what a DeepSpeed configuration offloads.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
        count: Parameters of the model, with its adapters.
        workers: Workers among whom the state is partitioned.
    """
    stage = ds_config["zero_optimization"]["stage"]
    return offloaded(Offload.from_ds_config(ds_config), stage, _weight_bytes(ds_config), count, workers)


def offloaded(
    offload: Offload, stage: int, weight_bytes: int, count: ParameterCount, workers: int
) -> HostMemory:
    """Return the host memory that one worker needs for states.

    Args:
        offload: Where they are.
        stage: Stage of ZeRO.
        weight_bytes: Of a parameter.
        count: Parameters of the model, with its adapters.
        workers: Workers among whom the state is partitioned.
    """
    trained, held, largest = (-(-n // workers) for n in (count.trained, count.total, count.largest))
    return HostMemory(
        optimizer=_optimizer_bytes(offload, trained, largest),
        parameters=_parameter_bytes(offload, held, largest, weight_bytes),
        building=0 if stage == 3 else weight_bytes * count.total,
    )


def disk_bytes(ds_config: Mapping[str, Any], count: ParameterCount, workers: int) -> int:
    """Return what one worker writes to its node's disk at most; what is small stays in memory.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
        count: Parameters of the model, with its adapters.
        workers: Workers among whom the state is partitioned.
    """
    offload, found = Offload.from_ds_config(ds_config), 0
    if offload.optimizer == "nvme":
        found += STATE_BYTES * -(-count.trained // workers)
    if offload.parameters == "nvme":
        found += _weight_bytes(ds_config) * -(-count.total // workers)
    return found


def _weight_bytes(ds_config: Mapping[str, Any]) -> int:
    return 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else _FP32_BYTES


def _optimizer_bytes(offload: Offload, trained: int, largest: int) -> int:
    if offload.optimizer == "nvme":  # one sub-group at a time, in buffers of its size
        return _FP32_BYTES * offload.sub_groups_in_memory * _sub_group(offload, trained, largest)
    return STATE_BYTES * trained if offload.optimizer == "cpu" else 0


def _parameter_bytes(offload: Offload, held: int, largest: int, weight_bytes: int) -> int:
    if offload.parameters == "nvme":
        return weight_bytes * (offload.parameters_in_memory + _sub_group(offload, held, largest))
    return weight_bytes * held if offload.parameters == "cpu" else 0


def _sub_group(offload: Offload, share: int, largest: int) -> int:
    """Return the parameters of the largest sub-group; it ends with the weight that fills it."""
    return min(share, offload.sub_group + largest)
