"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.atomic_files import read_lines
from orchestrator.config.schema import CheckpointSpec
from orchestrator.run.recorder import EVALUATIONS


@dataclass(frozen=True)
class Retention:
    """What is kept: a checkpoint for which one of the reasons applies.

    Attributes:
        newest: Number of newest checkpoints.
        every_steps: Every checkpoint whose step is a multiple of it; None for none.
        best: Number of checkpoints with the lowest evaluation loss.
        losses: Evaluation loss by step.
    """

    newest: int
    every_steps: int | None = None
    best: int = 0
    losses: Mapping[int, float] = field(default_factory=dict)

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Return the steps of the checkpoints to keep.

        Args:
            steps: Steps of all checkpoints, ascending.
        """
        kept = set(steps[-self.newest :])
        if self.every_steps is not None:
            kept |= {step for step in steps if step % self.every_steps == 0}
        # Of equal losses, the earlier step; a loss that is not a number is never the lowest.
        evaluated = [step for step in steps if self.losses.get(step, float("nan")) < float("inf")]
        return kept | set(sorted(evaluated, key=lambda step: (self.losses[step], step))[: self.best])


def retention_of(spec: CheckpointSpec, run_dir: Path) -> Retention:
    """Return what a job keeps, with the evaluation losses of the run so far."""
    losses: dict[int, float] = {}
    if spec.keep_best:
        for row in read_lines(run_dir / EVALUATIONS):  # of a repeated step, the last one counts
            losses[int(row["step"])] = float(row["evaluation_loss"])
    return Retention(spec.keep, spec.keep_every_steps, spec.keep_best, losses)
