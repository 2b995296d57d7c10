"""Checks that the packages of trackers and optimizers are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem
from orchestrator.metrics.trackers import missing_packages
from orchestrator.parallel.deepspeed_config import BITSANDBYTES


def package_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield a problem for each package that the job requires and that is not installed."""
    for message in missing_packages(job.metrics.trackers):
        yield ("metrics.trackers",), message
    problem = bitsandbytes_problem(job.optim.optimizer)
    if problem:
        yield ("optim.optimizer",), problem


def bitsandbytes_problem(optimizer: str) -> str | None:
    """Return an error if the optimizer requires bitsandbytes and it is not installed; None otherwise."""
    if optimizer not in BITSANDBYTES or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return (
        f"optim.optimizer={optimizer} requires bitsandbytes, which is not installed; install this package "
        "with the extra qlora, or use optimizer: adamw"
    )
