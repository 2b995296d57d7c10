"""The degrees of parallelism of a run, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import JobSpec


@dataclass(frozen=True)
class Layout:
    """How many workers there are and how they share the work.

    Attributes:
        world_size: Workers, one per device.
        sequence_parallel_size: Workers that share one sequence.
    """

    world_size: int
    sequence_parallel_size: int = 1

    @classmethod
    def of(cls, job: JobSpec) -> Layout:
        """Return the layout that a job asks for."""
        return cls(job.parallel.workers, job.parallel.sequence_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Number of different micro-batches at one time."""
        return self.world_size // self.sequence_parallel_size

    def data_parallel_rank(self, rank: int) -> int:
        """Return which of the micro-batches a rank works on; ranks of one sequence stand side by side."""
        return rank // self.sequence_parallel_size

    @property
    def gradient_divisor(self) -> int:
        """What DeepSpeed divides summed gradients by under ZeRO-2 and ZeRO-3 without sequence parallelism.

        Each rank's loss is multiplied by it, so that the gradient is the plain sum over ranks
        (`average_tensor` in deepspeed/runtime/zero/stage_1_and_2.py, `__avg_scatter_grads` in stage3.py).
        """
        return self.data_parallel_size
