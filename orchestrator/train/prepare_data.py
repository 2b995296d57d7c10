"""Tokenising and packing on CPUs, before any GPU is held."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
from transformers import PretrainedConfig

from orchestrator.atomic_files import JsonObject
from orchestrator.config.eval_sets import HELD_OUT, eval_sets, eval_sources
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.corpus import Corpus
from orchestrator.data.row_selection import Split, count_equal
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
        evaluation: Folder of each packed evaluation set by name.
        figures: Rows, tokens and packs of the training data, as `pack --json` prints them.
    """

    training: Path
    evaluation: Mapping[str, Path]
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
    training = _tokenize(job, model_config, job.data.train)
    evaluation: dict[str, list[Path]] = {}
    if sources := [source for _, source in eval_sources(job)]:
        stores = iter(_tokenize(job, model_config, sources))
        evaluation = {name: [next(stores) for _ in part] for name, part in eval_sets(job).items()}
    data: PreparedData = get_result(_pack.remote(job, training, evaluation))
    for line in (*_row_notes(job, data.figures), *vocabulary.notes(job, model_config)):
        _logger.info(line)
    for line in _overlaps(data.figures):
        _logger.warning(line)
    return data


def _tokenize(job: JobSpec, model_config: PretrainedConfig, sources: Sequence[SourceSpec]) -> list[Path]:
    """Return the folder of the token store of each source."""
    stores = tokenize_sources(job.model, job.data, sources, _cache(job))
    vocabulary.require_embedded(job, model_config, sources, stores)
    return [store.folder for store in stores]


def _cache(job: JobSpec) -> Path:
    return Path(job.checkpoint.storage) / run_dir.CACHE


@ray.remote(num_cpus=1)
def _pack(job: JobSpec, training: Sequence[Path], evaluation: Mapping[str, Sequence[Path]]) -> PreparedData:
    """Pack the stores of the training data and of each evaluation set."""
    stores = [TokenStore(folder) for folder in training]
    split = Split((job.eval.share if job.eval else None) or 0.0)
    seed, cache = job.run.seed, _cache(job)
    training_of = partial(packed_dataset.get_or_create, cache, stores, job.data.train, job.data, seed)
    folder = training_of(split)
    sets = {HELD_OUT: training_of(replace(split, held_out=True))} if split.share else {}
    for name, sources in eval_sets(job).items():
        opened = [TokenStore(each) for each in evaluation[name]]
        data = job.data.model_copy(update={"deduplicate": False})  # it applies to training data
        sets[name] = packed_dataset.get_or_create(cache, opened, sources, data, seed)
    corpus, packs = packed_dataset.load(folder)
    figures = packing_figures(job, corpus, packs)
    figures["evaluation"] = _evaluation_figures(corpus, sets)
    return PreparedData(folder, sets, figures)


def _evaluation_figures(training: Corpus, sets: Mapping[str, Path]) -> list[JsonObject]:
    """Return rows, tokens and packs of each evaluation set, and how many of its rows are also trained on."""
    trained = training.row_hashes()
    figures: list[JsonObject] = []
    for name, folder in sets.items():
        corpus, packs = packed_dataset.load(folder)
        rows = corpus.row_hashes()
        figures.append(
            {
                "name": name,
                "rows": len(rows),
                "rows_in_training": count_equal(rows, trained),
                "tokens_kept": corpus.counts.tokens_kept,
                "trained_tokens": corpus.counts.trained_tokens,
                "packs": len(packs),
            }
        )
    return figures


def _row_notes(job: JobSpec, figures: JsonObject) -> Iterator[str]:
    """Yield a line for each source with duplicates, and one for the rows that are held out."""
    rest = "and are left out" if job.data.deduplicate else "(data.deduplicate: true leaves them out)"
    for source in figures["sources"]:
        if source["rows_duplicate"]:
            yield (
                f"{source['rows_duplicate']:,} of {source['rows_in_files']:,} rows of {source['path']} equal "
                f"an earlier row {rest}"
            )
    if job.eval and job.eval.share:
        yield (
            f"eval.share={job.eval.share:g} holds out {figures['rows_held_out']:,} rows of data.train for "
            "evaluation"
        )


def _overlaps(figures: JsonObject) -> Iterator[str]:
    """Yield a warning for each evaluation set with rows that are also trained on."""
    for held_out in figures["evaluation"]:
        if held_out["rows_in_training"]:
            yield (
                f"{held_out['rows_in_training']:,} of {held_out['rows']:,} rows of the evaluation set "
                f"{held_out['name']} are also trained on, so its loss does not measure generalization; "
                "remove them from data.train or eval.data, or use eval.share to hold out rows"
            )
