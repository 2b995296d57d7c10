"""Whether the model of a job has an embedding for every token of its data."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.data.token_cache import TokenStore
from orchestrator.errors import SpecError
from orchestrator.model.build import stored_config
from orchestrator.model.vocabulary import vocabulary_notes, vocabulary_problem


def require_embedded(
    job: JobSpec, config: PretrainedConfig, sources: Sequence[SourceSpec], stores: Sequence[TokenStore]
) -> None:
    """Refuse token ids that the model has no row for; on CUDA they would end a worker in an assertion.

    Raises:
        SpecError: The largest of them, its source and the remedy.
    """
    largest: dict[str, int] = {}
    for source, store in zip(sources, stores, strict=True):
        largest[source.path] = max(largest.get(source.path, -1), store.manifest["largest_token"])
    if problem := vocabulary_problem(job.model, config, largest):
        raise SpecError(f"model.path={job.model.path} {problem}")


def notes(job: JobSpec, config: PretrainedConfig) -> Sequence[str]:
    """Return what a user should know of a vocabulary whose data `require_embedded` let pass."""
    return vocabulary_notes(job.model, config, stored_config(job.model))
