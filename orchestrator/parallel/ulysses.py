"""Ulysses sequence parallelism: rows are sharded by token between layers and by head inside attention.

An all-to-all before and one after attention switch between the two (Jacobs et al., arXiv 2309.14509).
Attention then runs on whole documents with their boundaries, as without sequence parallelism, so packing
stays exact with every attention backend. The DeepSpeed engine does not know of it: it treats each worker as a
data-parallel one, its gradient sums over all workers are correct, and every ZeRO stage divides them by the
same number (`ParallelDims.gradient_divisor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch import Tensor
from torch import distributed as dist

from orchestrator.parallel.parallel_dims import ParallelDims


@dataclass(frozen=True)
class SequenceGroup:
    """The workers that share a row.

    Attributes:
        handle: Process group.
        size: Number of workers, sp.
    """

    handle: dist.ProcessGroup
    size: int

    def to_heads(self, tensor: Tensor) -> Tensor:
        """Switch from sequence shards with all heads to the whole row with a shard of the heads.

        KV heads fewer than workers are repeated first, so that each worker gets the one that its query heads
        use; autograd sums the gradients of the repeated heads.

        Args:
            tensor: Queries, keys or values, shape [1, heads, T / size, head_dim].

        Returns:
            Shape [T, max(heads / size, 1), head_dim].
        """
        heads = tensor.shape[1]
        if heads < self.size:
            # repeat_interleave, not repeat: worker r gets the r-th head of the result, which must be the KV
            # head of its own query heads, r * kv_heads // size.
            tensor = tensor.repeat_interleave(self.size // heads, dim=1)
        # [1, heads, T / sp, d] -> [1, T / sp, heads, d] -> all-to-all -> [1, T, heads / sp, d]
        return _all_to_all(tensor.transpose(1, 2), self.handle, scatter=2, gather=1).squeeze(0)

    def to_sequence(self, tensor: Tensor) -> Tensor:
        """Switch back from head shards to sequence shards.

        Args:
            tensor: Attention output, shape [T, heads / size, head_dim].

        Returns:
            Shape [T / size, heads, head_dim].
        """
        # [1, T, heads / sp, d] -> all-to-all -> [1, T / sp, heads, d]
        return _all_to_all(tensor.unsqueeze(0), self.handle, scatter=1, gather=2).squeeze(0)


def _all_to_all(tensor: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
    """Run DeepSpeed's differentiable all-to-all: split dimension `scatter`, concatenate along `gather`."""
    from deepspeed.sequence.layer import _SeqAllToAll

    # 0 is the batch dimension. The backward pass is the same exchange with scatter and gather swapped. Both
    # directions keep the number of elements of each worker: T / sp * heads = T * heads / sp.
    exchanged: Tensor = _SeqAllToAll.apply(group, tensor.contiguous(), scatter, gather, 0)
    return exchanged


def create_sequence_group(dims: ParallelDims, collective_timeout_seconds: int) -> SequenceGroup | None:
    """Create the process groups of sequence parallelism and return this worker's; None if the degree is 1.

    Collective: every worker must call it once, after torch.distributed is initialized.

    Args:
        dims: Parallel dimensions.
        collective_timeout_seconds: Timeout of an all-to-all.
    """
    size = dims.sequence_parallel_size
    if size == 1:
        return None
    own = None
    for ranks in dims.sequence_groups():
        # The ranks of a group are consecutive, so its all-to-all stays inside a node if the size divides the
        # workers of each node.
        # new_group is collective over the world: every rank creates every group, in the same order.
        handle = dist.new_group(ranks, timeout=timedelta(seconds=collective_timeout_seconds))
        if dist.get_rank() in ranks:
            own = SequenceGroup(handle, size)
    return own
