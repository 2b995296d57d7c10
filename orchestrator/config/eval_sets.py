"""The sources of a job: those of data.train, and those of each evaluation set of eval.data."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.config.schema import EvalSpec, JobSpec, SourceSpec

HELD_OUT = "held_out"
"""Name of the evaluation set that eval.share holds out."""
UNNAMED = "eval"
"""Name of the evaluation set of an eval.data that is a list."""

_Set = tuple[SourceSpec, ...] | SourceSpec


def eval_sets(job: JobSpec) -> dict[str, tuple[SourceSpec, ...]]:
    """Return the sources of each evaluation set of eval.data by name."""
    return {
        name: (written,) if isinstance(written, SourceSpec) else written
        for name, written in _written(job.eval).items()
    }


def eval_sources(job: JobSpec) -> tuple[tuple[str, SourceSpec], ...]:
    """Return the dotted field and the source of all evaluation sets of eval.data, in order."""
    found: list[tuple[str, SourceSpec]] = []
    for name, written in _written(job.eval).items():
        is_named = job.eval is not None and isinstance(job.eval.data, dict)
        field = f"eval.data.{name}" if is_named else "eval.data"
        if isinstance(written, SourceSpec):
            found.append((field, written))
        else:
            found += [(f"{field}.{number}", source) for number, source in enumerate(written)]
    return tuple(found)


def all_sources(job: JobSpec) -> tuple[tuple[str, SourceSpec], ...]:
    """Return the dotted field and the source of all training and evaluation data."""
    training = ((f"data.train.{number}", source) for number, source in enumerate(job.data.train))
    return (*training, *eval_sources(job))


def with_sources(evaluation: EvalSpec, change: Callable[[SourceSpec], SourceSpec]) -> EvalSpec:
    """Return a copy whose sources are changed."""

    def changed(written: _Set) -> _Set:
        return change(written) if isinstance(written, SourceSpec) else tuple(map(change, written))

    data = evaluation.data
    if data is None:
        return evaluation
    if isinstance(data, dict):
        sets = {name: changed(written) for name, written in data.items()}
        return evaluation.model_copy(update={"data": sets})
    return evaluation.model_copy(update={"data": changed(data)})


def _written(evaluation: EvalSpec | None) -> dict[str, _Set]:
    """Return the evaluation sets as they are written: a source, or a list of sources."""
    if evaluation is None or evaluation.data is None:
        return {}
    return evaluation.data if isinstance(evaluation.data, dict) else {UNNAMED: evaluation.data}
