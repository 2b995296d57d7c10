"""Checks of a job against the config.json of a local model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.arch.hf_config import local_config
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem
from orchestrator.parallel.parallel_dims import sequence_parallel_problem


def text_config(path: str) -> Mapping[str, object]:
    """Return the text configuration of a local model; empty if there is no readable config.json.

    Args:
        path: `model.path` of a job.
    """
    config = local_config(path) or {}
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def positive_int(config: Mapping[str, object], name: str) -> int | None:
    """Return a field of a configuration; None unless it is an integer above 0."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else None


def model_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield a problem if the attention heads of the model do not divide by sequence_parallel_size."""
    size, config = job.parallel.sequence_parallel_size, text_config(job.model.path)
    heads = positive_int(config, "num_attention_heads")
    if size == 1 or heads is None:
        return
    problem = sequence_parallel_problem(size, heads, positive_int(config, "num_key_value_heads") or heads)
    if problem:
        yield ("parallel.sequence_parallel_size",), problem
