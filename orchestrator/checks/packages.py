"""Packages that a job needs and this environment does not have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem
from orchestrator.metrics.trackers import missing_packages
from orchestrator.parallel.deepspeed_config import BITSANDBYTES


def package_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield the packages that a job needs and that are not installed here."""
    for sentence in missing_packages(job.metrics.trackers):
        yield ("metrics.trackers",), sentence
    problem = bitsandbytes_problem(job.optim.optimizer)
    if problem:
        yield ("optim.optimizer",), problem


def bitsandbytes_problem(optimizer: str) -> str | None:
    """Return that an optimizer needs bitsandbytes and that is not installed, or None."""
    if optimizer not in BITSANDBYTES or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return (
        f"optim.optimizer={optimizer} needs bitsandbytes, which is not installed; install this package with "
        "the extra qlora, or use optimizer: adamw"
    )
