"""Checks that the model has an embedding row for every token of the data."""

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
    """Refuse token ids beyond the embedding, which on CUDA would fail in a device-side assertion.

    Raises:
        SpecError: Names the largest token id, its source and the remedy.
    """
    largest: dict[str, int] = {}
    for source, store in zip(sources, stores, strict=True):
        largest[source.path] = max(largest.get(source.path, -1), store.manifest["largest_token"])
    if problem := vocabulary_problem(job.model, config, largest):
        raise SpecError(f"model.path={job.model.path} {problem}")


def notes(job: JobSpec, config: PretrainedConfig) -> Sequence[str]:
    """Return messages about the sizes of vocabulary and embedding of an accepted job."""
    return vocabulary_notes(job.model, config, stored_config(job.model))
