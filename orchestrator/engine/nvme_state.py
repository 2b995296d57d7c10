"""Reads and replaces ZeRO-3 state that is offloaded to NVMe.

ZeRO-3 keeps one flat fp32 partition a sub-group: a 1-D tensor with this rank's share of the sub-group's
parameters. Its Adam moments `exp_avg` and `exp_avg_sq` have the same shape. All three are files on NVMe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from orchestrator.engine.fragments import is_on_nvme
from orchestrator.engine.train_engine import TrainEngine, ZeroOptimizer


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
    """DeepSpeed's ZeRO-3 optimizer, as far as its state is replaced.

    Attributes:
        optimizer: Adam, whose state is keyed by the flat fp32 partitions.
        fp32_partitioned_groups_flat: The flat fp32 partition of each sub-group.
    """

    optimizer: torch.optim.Optimizer
    optimizer_swapper: _Swapper
    swap_optimizer: bool
    fp32_partitioned_groups_flat: list[nn.Parameter]

    def _swappable_optimizer_subgroup(self, sub_group_id: int) -> bool: ...

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


@contextmanager
def mapped_optimizer_state(engine: TrainEngine) -> Iterator[None]:
    """Map the optimizer state on NVMe into memory, so that its tensors can be saved like any others.

    Pages of a mapped file need not fit into host memory, whatever the size of the state.

    Args:
        engine: DeepSpeed's engine, between two steps.

    Raises:
        RuntimeError: A file of the swap folder is missing.
    """
    swapper: _Swapper | None = getattr(engine.optimizer, "optimizer_swapper", None)
    sub_groups = list(swapper.swap_params_info.values()) if swapper is not None else []
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


def replaced_sub_groups(engine: TrainEngine) -> Iterator[int]:
    """Yield the number of each sub-group while its fp32 partition is in host memory, to be replaced.

    The caller replaces the partition and gives the optimizer its state. Before the next one, the partition is
    copied to the low-precision parameters, and written to NVMe with the state, if it is kept there.

    Args:
        engine: DeepSpeed's engine; offloads to NVMe.
    """
    assert is_on_nvme(engine)
    optimizer = cast(_Zero3Optimizer, engine.optimizer)
    if optimizer.swap_optimizer:
        # Forget the files of this engine's own moments, or swapping in would read them.
        optimizer.optimizer_swapper.purge_state()
    for index, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.optimizer.state.pop(partition, None)
        is_swapped = optimizer._swappable_optimizer_subgroup(index)
        if is_swapped:
            # Allocates buffers for the fp32 partition alone, as no file of moments is known any more.
            optimizer.optimizer_swapper.swap_in_optimizer_state(partition)
        yield index
        # Copies the fp32 partition to the low-precision parameters, which may be on NVMe as well.
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if is_swapped:
            optimizer.optimizer_swapper.swap_out_optimizer_state(partition)
