"""The degrees of parallelism of a run, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import JobSpec


@dataclass(frozen=True)
class ParallelDims:
    """How many workers there are and how they share the work.

    Attributes:
        world_size: Workers, one per device.
        sequence_parallel_size: Workers that share one sequence.
    """

    world_size: int
    sequence_parallel_size: int = 1

    @classmethod
    def from_job(cls, job: JobSpec) -> ParallelDims:
        """Return the layout that a job asks for."""
        return cls(job.parallel.workers, job.parallel.sequence_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Number of different micro-batches at one time."""
        return self.world_size // self.sequence_parallel_size

    def data_parallel_rank(self, rank: int) -> int:
        """Return which of the micro-batches a rank works on; ranks of one sequence stand side by side."""
        return rank // self.sequence_parallel_size

    def sequence_rank(self, rank: int) -> int:
        """Return which part of its row a rank holds."""
        return rank % self.sequence_parallel_size

    def sequence_groups(self) -> list[list[int]]:
        """Return the ranks that share each row."""
        size = self.sequence_parallel_size
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    @property
    def gradient_divisor(self) -> int:
        """What DeepSpeed divides summed gradients by, whatever the ZeRO stage: workers that it knows of.

        It is not told of sequence parallelism, so to it every worker is a data-parallel one. Each rank's loss
        is multiplied by this, so that the gradient is the plain sum over ranks (`average_tensor` in
        deepspeed/runtime/zero/stage_1_and_2.py, `__avg_scatter_grads` in stage3.py).
        """
        return self.world_size


def sequence_parallel_degrees(heads: int, kv_heads: int) -> list[int]:
    """Return how many workers can share a row of a model.

    Args:
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def sequence_parallel_problem(size: int, heads: int, kv_heads: int) -> str | None:
    """Return why a model's heads cannot be shared by so many workers, and which numbers would do.

    Each worker attends with heads / size query heads. Their keys and values must be whole heads as well: the
    KV heads are dealt out, or each is repeated the same number of times.

    Args:
        size: Workers that share a row.
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    able = sequence_parallel_degrees(heads, kv_heads)
    if size in able:
        return None
    *others, last = map(str, able)
    choice = f"{', '.join(others)} or {last}" if others else last
    return (
        f"parallel.sequence_parallel_size={size} does not fit num_attention_heads={heads} and "
        f"num_key_value_heads={kv_heads}: it must divide the first, and divide or be a multiple of the "
        f"second; use {choice}"
    )
