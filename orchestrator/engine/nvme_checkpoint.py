"""What ZeRO-3 keeps on a disk, in and out of checkpoints that are the same as of a run in memory.

DeepSpeed 0.19 does not do this rightly: `save_checkpoint` (deepspeed/runtime/engine.py) writes the swapped
tensors as empty ones and copies the swap folder beside them; `load_checkpoint` then skips the optimizer's
shard altogether, so that what is too small to be swapped keeps the weights of a fresh model, and Adam forgets
moments and steps. What would read the shard, `_rigid_load_state_dict` (deepspeed/runtime/zero/stage3.py),
swaps in moments from the disk over those it was given, and has no buffers for parameters that lie there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.errors import TrainingError


@contextmanager
def whole_state(engine: Any) -> Iterator[None]:
    """Let the optimizer's tensors be whole for what runs inside, though they stay on the disk.

    They are mapped from their files, so they take no memory of the host, whatever their size.

    Args:
        engine: DeepSpeed's engine, between two steps.
    """
    swapped = _swapped(engine.optimizer)
    try:
        for info in swapped:
            for tensor in info.tensors:
                tensor.compute_tensor.data = torch.from_file(
                    tensor.swap_path, shared=False, size=info.numel(), dtype=info.dtype()
                )
        yield
    finally:
        for info in swapped:
            info.release_memory()


@contextmanager
def keeps_to_its_shards(engine: Any) -> Iterator[None]:
    """Keep DeepSpeed from copying the swap folder to or from a checkpoint for what runs inside."""
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer


@contextmanager
def restores_to_disk(engine: Any) -> Iterator[None]:
    """Let `engine.load_checkpoint` write to the disk what belongs there, and trust nothing that lies there.

    Raises:
        TrainingError: By the load inside: the state was written in other sub-groups than the engine's.
    """
    optimizer = engine.optimizer
    if not (
        getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)
    ):
        yield
        return
    reader = engine.checkpoint_engine
    engine.checkpoint_engine = _MappingReader(reader)
    optimizer._rigid_load_state_dict = lambda state, load_optimizer_states=True: _restore(optimizer, state)
    try:
        with keeps_to_its_shards(engine):
            yield
    finally:
        del optimizer._rigid_load_state_dict
        engine.checkpoint_engine = reader


class _MappingReader:
    """DeepSpeed's reader of checkpoints, which maps the shards of the optimizer instead of reading them."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what a file holds."""
        if path.endswith("optim_states.pt"):
            return torch.load(path, map_location=map_location, mmap=True, weights_only=False)
        return self._reader.load(path, map_location=map_location)


def _swapped(optimizer: Any) -> list[Any]:
    """Return DeepSpeed's notes of the sub-groups that lie on the disk."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return list(swapper.swap_params_info.values()) if swapper is not None else []


def _restore(optimizer: Any, state: dict[str, Any]) -> None:
    """Do what DeepSpeed's `_rigid_load_state_dict` does, and swap each sub-group out as it is restored.

    Raises:
        TrainingError: The state was written in other sub-groups.
    """
    whole, mine = state["fp32_flat_groups"], optimizer.fp32_partitioned_groups_flat
    found = [group.numel() for group in whole]
    if found != optimizer.fp16_partitioned_groups_flat_numel:
        raise TrainingError(
            f"the checkpoint holds sub-groups of {found} parameters, and this run has "
            f"{optimizer.fp16_partitioned_groups_flat_numel}; resume with the offload_optimizer, "
            "offload_param and method that wrote it"
        )
    optimizer.loss_scaler = state["loss_scaler"]
    optimizer.dynamic_loss_scale = state["dynamic_loss_scale"]
    optimizer.overflow = state["overflow"]
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(state["optimizer_state_dict"])
    optimizer._clear_fp32_optimizer_param_groups()
    if optimizer.swap_optimizer:
        optimizer.optimizer_swapper.purge_state()  # the moments are those that were just loaded
    for number, (group, saved) in enumerate(zip(mine, whole, strict=True)):
        moments = optimizer.optimizer.state.pop(group, {})
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:  # the weights alone, into buffers: DeepSpeed reads what it knows of
            optimizer.optimizer_swapper.swap_in_optimizer_state(group)
        group.data.copy_(saved.data)
        if moments:
            optimizer.optimizer.state[group] = moments if swapped else _in_memory(moments)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer.optimizer_swapper.swap_out_optimizer_state(group)


def _in_memory(moments: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of moments that are mapped from a checkpoint, which may be removed later."""
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in moments.items()}
