"""Results of the search: candidates with their predictions, suggested changes, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.schema import JobSpec
from orchestrator.planner.estimate import Prediction

FIELDS = (
    "parallel.workers",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "parallel.offload_param",
    "parallel.sequence_parallel_size",
    "optim.micro_batch_size",
    "model.gradient_checkpointing",
    "model.loss_tile_tokens",
    "parallel.offload_activations",
)
"""Job fields that the search sets."""


@dataclass(frozen=True)
class Candidate:
    """A job with its prediction.

    Attributes:
        job: The job.
        prediction: Predicted memory and step time.
    """

    job: JobSpec
    prediction: Prediction

    @property
    def settings(self) -> dict[str, object]:
        """Values of `FIELDS`."""
        return {name: field_value(self.job, name) for name in FIELDS}

    @property
    def seconds_per_pack(self) -> float:
        """Step time over packs per step, comparable between batch sizes."""
        seconds = self.prediction.seconds
        return float("inf") if seconds is None else seconds / self.job.optim.global_batch_size

    def changes_to(self, other: Candidate) -> dict[str, object]:
        """Return the settings in which another candidate differs from this one."""
        mine = self.settings
        return {name: value for name, value in other.settings.items() if value != mine[name]}


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a job fit.

    Attributes:
        changes: New values by field; `--gpus` stands for another cluster.
        candidate: The changed job with its prediction.
    """

    changes: Mapping[str, object]
    candidate: Candidate


@dataclass(frozen=True)
class Plan:
    """Result of a search.

    Attributes:
        cluster: The nodes and devices.
        asked: The job as written.
        best: The preferred candidate; None if no candidate fits.
        others: The best candidate of every other combination of ZeRO stage, offload and sequence parallel
            size, those that fit first.
        considered: Number of candidates that were predicted.
    """

    cluster: ClusterSpec
    asked: Candidate
    best: Candidate | None
    others: tuple[Candidate, ...]
    considered: int


def field_value(job: JobSpec, dotted: str) -> object:
    """Return the value of a job field by its dotted name."""
    section, _, name = dotted.partition(".")
    return getattr(getattr(job, section), name)
