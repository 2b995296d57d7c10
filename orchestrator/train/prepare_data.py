"""Tokenising and packing on CPUs, before any GPU is held."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from transformers import PretrainedConfig

from orchestrator.atomic_files import JsonObject
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.token_cache import TokenStore
from orchestrator.data.tokenize import tokenize_sources
from orchestrator.run import run_dir
from orchestrator.run.report import packing_figures
from orchestrator.train import vocabulary
from orchestrator.train.ray_session import get_result

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The packed datasets of a run.

    Attributes:
        training: Folder of the packed training data.
        evaluation: Folder of the packed evaluation data; None if the job has none.
        figures: Rows, tokens and packs of the training data, as `pack --json` prints them.
    """

    training: Path
    evaluation: Path | None
    figures: JsonObject


def prepare_data(job: JobSpec, model_config: PretrainedConfig) -> PreparedData:
    """Tokenise and pack the training and evaluation data, or open what an earlier run left in the cache.

    Args:
        job: The job, with absolute paths.
        model_config: Configuration of its model, which every token id must fit.

    Raises:
        SpecError: The data cannot be read or do not fit the model.
        ClusterError: The cache cannot be written.
    """
    training, figures = _pack(job, model_config, job.data.train)
    evaluation = _pack(job, model_config, job.eval.data)[0] if job.eval else None
    for line in (*_duplicate_notes(job, figures), *vocabulary.notes(job, model_config)):
        _logger.info(line)
    return PreparedData(training, evaluation, figures)


def _duplicate_notes(job: JobSpec, figures: JsonObject) -> list[str]:
    """Return a line for each source with rows that equal an earlier row."""
    rest = "and are left out" if job.data.deduplicate else "(data.deduplicate: true leaves them out)"
    return [
        f"{source['rows_duplicate']:,} of {source['rows_in_files']:,} rows of {source['path']} equal an "
        f"earlier row {rest}"
        for source in figures["sources"]
        if source["rows_duplicate"]
    ]


def _pack(
    job: JobSpec, model_config: PretrainedConfig, sources: Sequence[SourceSpec]
) -> tuple[Path, JsonObject]:
    cache = Path(job.checkpoint.storage) / run_dir.CACHE
    stores = tokenize_sources(job.model, job.data, sources, cache)
    vocabulary.require_embedded(job, model_config, sources, stores)
    packed: tuple[Path, JsonObject] = get_result(
        _pack_stores.remote(job, sources, cache, [store.folder for store in stores])
    )
    return packed


@ray.remote(num_cpus=1)
def _pack_stores(
    job: JobSpec, sources: Sequence[SourceSpec], cache: Path, stores: Sequence[Path]
) -> tuple[Path, JsonObject]:
    opened = [TokenStore(folder) for folder in stores]
    folder = packed_dataset.get_or_create(cache, opened, sources, job.data, job.run.seed)
    is_training = tuple(sources) == job.data.train
    return folder, packing_figures(job, *packed_dataset.load(folder)) if is_training else {}
