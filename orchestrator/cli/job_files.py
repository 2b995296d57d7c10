"""Reading job files for a command: what stands in their way here, and warnings of what is unusual in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.checks.job import all_problems, none, refusals
from orchestrator.checks.warnings import unusual, unusual_here
from orchestrator.cli.output import write_message
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError


def examined(jobs: Sequence[Path], overrides: Sequence[str], files: bool) -> tuple[list[str], list[str]]:
    """Return all problems and all warnings of job files.

    Args:
        jobs: The files.
        overrides: Applied on top of each.
        files: Whether to look for what they name on this machine.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for path in jobs:
        try:
            _, found, odd = loader.examine(path, overrides, all_problems if files else none, unusual_here)
        except SpecError as error:
            problems += error.problems
        else:
            problems += found
            warnings += odd
    return problems, warnings


def warn(warnings: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        write_message(f"warning: {warning}")


def load_to_train(job: Path, overrides: Sequence[str], workers_here: bool) -> JobSpec:
    """Return a job that is to be trained from this machine, and print what is unusual in it.

    Raises:
        SpecError: With every problem of the file, and of what it names here.
    """
    spec, warnings = loader.load_with_warnings(
        job, overrides, lambda found: refusals(found, workers_here), unusual
    )
    warn(warnings)
    return spec


def load_to_send(job: Path, overrides: Sequence[str]) -> JobSpec:
    """Return a job that is to be trained elsewhere, and print what is unusual in it.

    Raises:
        SpecError: With every problem of the file.
    """
    spec, warnings = loader.load_with_warnings(job, overrides, none, unusual)
    warn(warnings)
    return spec
