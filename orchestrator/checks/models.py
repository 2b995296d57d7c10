"""What a model's config.json alone says against a job, where the model lies on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.arch.hf_config import local_config
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem
from orchestrator.parallel.parallel_dims import sequence_parallel_problem


def text_config(path: str) -> Mapping[str, Any]:
    """Return the configuration of a local model's language part; empty where there is none to read.

    Args:
        path: `model.path` of a job.
    """
    config = local_config(path) or {}
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def whole(config: Mapping[str, Any], name: str) -> int | None:
    """Return a field that is a whole number above 0, or None."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else None


def model_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield what keeps a job's workers from sharing the sequences of its model."""
    size, config = job.parallel.sequence_parallel_size, text_config(job.model.path)
    heads = whole(config, "num_attention_heads")
    if size == 1 or heads is None:
        return
    problem = sequence_parallel_problem(size, heads, whole(config, "num_key_value_heads") or heads)
    if problem:
        yield ("parallel.sequence_parallel_size",), problem
