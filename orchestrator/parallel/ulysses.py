"""Ulysses: between layers a worker holds a part of the row; inside attention, all of it for some heads.

Two all-to-alls around attention change from one to the other (Jacobs et al., arXiv 2309.14509). Attention
itself then sees whole documents and their boundaries, as it does without sequence parallelism, so packing
stays exact on every kernel. DeepSpeed's engine is not told: to it each worker is one with data of its own,
its sums over all workers are right, and every ZeRO path divides them by the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch import distributed as dist

from orchestrator.parallel.parallel_dims import ParallelDims


@dataclass(frozen=True)
class SequenceGroup:
    """The workers that share a row.

    Attributes:
        handle: Their process group.
        size: How many they are.
    """

    handle: Any
    size: int

    def to_heads(self, tensor: Tensor) -> Tensor:
        """Exchange a part of the row with all heads for all of the row with a part of the heads.

        Fewer heads than workers are repeated, so that each worker gets the one that its query heads attend
        with; their gradients are summed on the way back.

        Args:
            tensor: Queries, keys or values, shape [1, heads, T / size, head_dim].

        Returns:
            Shape [T, heads / size, head_dim]; one head where there are fewer than workers.
        """
        heads = tensor.shape[1]
        if heads < self.size:
            tensor = tensor.repeat_interleave(self.size // heads, dim=1)
        return _exchange(tensor.transpose(1, 2), self.handle, scatter=2, gather=1).squeeze(0)

    def to_sequence(self, tensor: Tensor) -> Tensor:
        """Exchange back.

        Args:
            tensor: What attention gave, shape [T, heads / size, head_dim].

        Returns:
            Shape [T / size, heads, head_dim].
        """
        return _exchange(tensor.unsqueeze(0), self.handle, scatter=1, gather=2).squeeze(0)


def _exchange(tensor: Tensor, group: Any, scatter: int, gather: int) -> Tensor:
    """Run DeepSpeed's differentiable all-to-all on [1, T, heads, head_dim]."""
    from deepspeed.sequence.layer import _SeqAllToAll

    exchanged: Tensor = _SeqAllToAll.apply(group, tensor.contiguous(), scatter, gather, 0)
    return exchanged


def join(layout: ParallelDims, collective_timeout_seconds: int) -> SequenceGroup | None:
    """Make the groups of workers that share a row, and return this worker's, if there are any.

    Every worker calls it once, after the process group is initialised.

    Args:
        layout: The degrees.
        collective_timeout_seconds: How long an exchange may wait.
    """
    size = layout.sequence_parallel_size
    if size == 1:
        return None
    mine = None
    for ranks in layout.sequence_groups():
        handle = dist.new_group(ranks, timeout=timedelta(seconds=collective_timeout_seconds))
        if dist.get_rank() in ranks:
            mine = SequenceGroup(handle, size)
    return mine
