"""Data-parallel and sequence-parallel sizes of a run, and the ranks of each group."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import JobSpec


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism of a run.

    Attributes:
        world_size: Number of workers, one per device.
        sequence_parallel_size: Number of workers that share one sequence.
    """

    world_size: int
    sequence_parallel_size: int = 1

    @classmethod
    def from_job(cls, job: JobSpec) -> ParallelDims:
        """Return the degrees of parallelism of a job."""
        return cls(job.parallel.workers, job.parallel.sequence_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Number of different micro-batches that are processed in parallel."""
        return self.world_size // self.sequence_parallel_size

    def data_parallel_rank(self, rank: int) -> int:
        """Return the index of a rank's micro-batch; ranks of a sequence-parallel group are consecutive."""
        return rank // self.sequence_parallel_size

    def sequence_rank(self, rank: int) -> int:
        """Return the index of the slice of its row that a rank holds."""
        return rank % self.sequence_parallel_size

    def sequence_groups(self) -> list[list[int]]:
        """Return the ranks of each sequence-parallel group."""
        size = self.sequence_parallel_size
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    @property
    def gradient_divisor(self) -> int:
        """The number by which DeepSpeed divides summed gradients, for every ZeRO stage: the world size.

        DeepSpeed is not configured for sequence parallelism, so it treats every worker as data-parallel. Each
        rank multiplies its loss by this number, so that the gradient is the plain sum over ranks
        (`average_tensor` in deepspeed/runtime/zero/stage_1_and_2.py, `__avg_scatter_grads` in stage3.py).
        """
        return self.world_size


def sequence_parallel_degrees(heads: int, kv_heads: int) -> list[int]:
    """Return the sequence-parallel sizes that a model's head counts allow, ascending.

    Args:
        heads: Number of query heads.
        kv_heads: Number of key-value heads.
    """
    # n divides the query heads. KV heads are split (n divides kv_heads) or replicated (kv_heads divides n).
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def sequence_parallel_problem(size: int, heads: int, kv_heads: int) -> str | None:
    """Return why `size` is not a valid sequence-parallel size for a model, with valid sizes; else None.

    Inside attention each worker holds heads / size query heads and the KV heads that they use. KV heads are
    either split among the workers, or each is replicated on the same number of workers.

    Args:
        size: Number of workers that share a row.
        heads: Number of query heads.
        kv_heads: Number of key-value heads.
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
