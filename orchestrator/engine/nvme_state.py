"""Checkpoints of ZeRO-3 state that is offloaded to NVMe, in the same format as without offload.

DeepSpeed 0.19 has three defects here. `save_checkpoint` (deepspeed/runtime/engine.py) writes offloaded
tensors as empty tensors and copies the swap folder next to them. `load_checkpoint` then skips the optimizer
shard, so that parameters too small to be offloaded keep their initial values, and Adam loses its moments
and step count. `_rigid_load_state_dict` (deepspeed/runtime/zero/stage3.py), which would read the shard,
overwrites the loaded moments by those on NVMe, and has no buffers for parameters that are on NVMe.

ZeRO-3 keeps one flat fp32 partition a sub-group: a 1-D tensor with this rank's share of the sub-group's
parameters. Its Adam moments `exp_avg` and `exp_avg_sq` have the same shape. All three are files on NVMe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from orchestrator.engine.train_engine import CheckpointIO, TrainEngine, ZeroOptimizer
from orchestrator.errors import TrainingError

_Moments = dict[str, object]


class _OffloadedTensor(Protocol):
    """A tensor of a sub-group, and its file on NVMe."""

    compute_tensor: Tensor
    swap_path: str


class _SubGroup(Protocol):
    """DeepSpeed's record of a sub-group on NVMe (`OptimizerStateSwapInfo`)."""

    tensors: Sequence[_OffloadedTensor]

    def numel(self) -> int: ...

    def dtype(self) -> torch.dtype: ...

    def release_memory(self) -> None: ...


class _Swapper(Protocol):
    """DeepSpeed's swapper of optimizer state (deepspeed/runtime/swap_tensor)."""

    swap_params_info: Mapping[int, _SubGroup]

    def purge_state(self) -> None: ...

    def swap_in_optimizer_state(self, parameter: nn.Parameter) -> None: ...

    def swap_out_optimizer_state(self, parameter: nn.Parameter) -> None: ...


class _Zero3Optimizer(ZeroOptimizer, Protocol):
    """DeepSpeed's ZeRO-3 optimizer, as far as loading a checkpoint touches it.

    Attributes:
        optimizer: Adam, whose state is keyed by the flat fp32 partitions.
        fp32_partitioned_groups_flat: The flat fp32 partition of each sub-group.
        fp16_partitioned_groups_flat_numel: Their sizes, also while they are on NVMe.
    """

    optimizer: torch.optim.Optimizer
    optimizer_swapper: _Swapper
    swap_optimizer: bool
    fp32_partitioned_groups_flat: list[nn.Parameter]
    fp16_partitioned_groups_flat_numel: list[int]
    loss_scaler: object
    dynamic_loss_scale: bool
    overflow: bool
    _rigid_load_state_dict: Callable[..., None]

    def _set_fp32_optimizer_param_groups(self) -> None: ...

    def _clear_fp32_optimizer_param_groups(self) -> None: ...

    def _swappable_optimizer_subgroup(self, sub_group_id: int) -> bool: ...

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


@contextmanager
def mapped_optimizer_state(engine: TrainEngine) -> Iterator[None]:
    """Map the optimizer state on NVMe into memory, so that its tensors can be saved like any others.

    Pages of a mapped file need not fit into host memory, whatever the size of the state.

    Args:
        engine: DeepSpeed's engine, between two steps.
    """
    sub_groups = _sub_groups_on_nvme(engine)
    try:
        for sub_group in sub_groups:
            for tensor in sub_group.tensors:
                # shared=False: a write would go to a private page and not to the file.
                tensor.compute_tensor.data = torch.from_file(
                    tensor.swap_path, shared=False, size=sub_group.numel(), dtype=sub_group.dtype()
                )
        yield
    finally:
        for sub_group in sub_groups:
            sub_group.release_memory()


@contextmanager
def without_swap_folder(engine: TrainEngine) -> Iterator[None]:
    """Keep DeepSpeed from copying the swap folder to or from a checkpoint."""
    # `save_checkpoint` and `load_checkpoint` ask this method; it is called nowhere else at that time.
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer  # the class's own method again


@contextmanager
def restore_to_nvme(engine: TrainEngine) -> Iterator[None]:
    """Make `engine.load_checkpoint` write offloaded state to NVMe, and ignore what the files there hold.

    Raises:
        TrainingError: By the load inside: the checkpoint has other sub-groups than the engine.
    """
    if not (
        getattr(engine.optimizer, "swap_optimizer", False)
        or getattr(engine.optimizer, "params_in_nvme_and_cpu", False)
    ):
        yield
        return
    optimizer = cast(_Zero3Optimizer, engine.optimizer)
    reader = engine.checkpoint_engine
    engine.checkpoint_engine = _MappingReader(reader)
    # An instance attribute hides the method of the class until it is deleted.
    optimizer._rigid_load_state_dict = lambda state, load_optimizer_states=True: _restore(optimizer, state)
    try:
        with without_swap_folder(engine):
            yield
    finally:
        del optimizer._rigid_load_state_dict
        engine.checkpoint_engine = reader


class _MappingReader:
    """DeepSpeed's checkpoint reader, except that optimizer shards are mapped instead of read."""

    def __init__(self, reader: CheckpointIO) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> object:
        return getattr(self._reader, name)

    def save(self, state_dict: Mapping[str, object], path: str) -> object:
        """Write one file."""
        return self._reader.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> object:
        """Return the content of a file."""
        if path.endswith("optim_states.pt"):
            # As large as the offloaded state, so reading it could exceed host memory.
            return torch.load(path, map_location=map_location, mmap=True, weights_only=False)
        return self._reader.load(path, map_location=map_location)


def _sub_groups_on_nvme(engine: TrainEngine) -> list[_SubGroup]:
    swapper: _Swapper | None = getattr(engine.optimizer, "optimizer_swapper", None)
    return list(swapper.swap_params_info.values()) if swapper is not None else []


def _restore(optimizer: _Zero3Optimizer, state: Mapping[str, Any]) -> None:
    """Replace DeepSpeed's `_rigid_load_state_dict`: restore one sub-group at a time and swap it out.

    Args:
        optimizer: The ZeRO-3 optimizer to restore.
        state: Content of this rank's optimizer shard, mapped.

    Raises:
        TrainingError: The checkpoint has other sub-groups.
    """
    saved_partitions, partitions = state["fp32_flat_groups"], optimizer.fp32_partitioned_groups_flat
    saved_sizes = [saved.numel() for saved in saved_partitions]
    if saved_sizes != optimizer.fp16_partitioned_groups_flat_numel:
        raise TrainingError(
            f"the checkpoint has sub-groups of {saved_sizes} parameters, and this run has "
            f"{optimizer.fp16_partitioned_groups_flat_numel}; resume with the offload_optimizer, "
            "offload_param and method that wrote it"
        )
    # From here as upstream, up to the loop: scalars, then Adam's hyperparameters and step counts.
    optimizer.loss_scaler = state["loss_scaler"]
    optimizer.dynamic_loss_scale = state["dynamic_loss_scale"]
    optimizer.overflow = state["overflow"]
    # Adam's param_groups are empty between steps; load_state_dict needs the partitions in them.
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(state["optimizer_state_dict"])
    optimizer._clear_fp32_optimizer_param_groups()
    if optimizer.swap_optimizer:
        # Forget the files of this run's fresh moments, or swapping in would overwrite the loaded ones.
        optimizer.optimizer_swapper.purge_state()
    for index, (partition, saved) in enumerate(zip(partitions, saved_partitions, strict=True)):
        moments: _Moments = optimizer.optimizer.state.pop(partition, {})
        is_on_nvme = optimizer._swappable_optimizer_subgroup(index)
        if is_on_nvme:
            # Allocates buffers for the fp32 partition alone, as no file of moments is known any more.
            optimizer.optimizer_swapper.swap_in_optimizer_state(partition)
        partition.data.copy_(saved.data)  # both 1-D, of the sub-group's size on this rank
        if moments:
            optimizer.optimizer.state[partition] = moments if is_on_nvme else _copied(moments)
        # Copies the fp32 partition into the low-precision parameters, which may be on NVMe as well.
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if is_on_nvme:
            optimizer.optimizer_swapper.swap_out_optimizer_state(partition)


def _copied(moments: _Moments) -> _Moments:
    """Return moments in memory: the loaded ones are mapped from a checkpoint that may be removed later."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in moments.items()}
