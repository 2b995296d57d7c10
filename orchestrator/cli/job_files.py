"""Loads job files for commands, with problems and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.checks.job import all_problems, none, refusals
from orchestrator.checks.warnings import unusual, unusual_here
from orchestrator.cli.output import write_message
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError


def check_job_files(
    jobs: Sequence[Path], overrides: Sequence[str], files: bool
) -> tuple[list[str], list[str]]:
    """Return all problems and all warnings of job files.

    Args:
        jobs: The files.
        overrides: Applied on top of each.
        files: Whether to check data, models and folders on this machine.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for path in jobs:
        try:
            _, file_problems, file_warnings = loader.examine(
                path, overrides, all_problems if files else none, unusual_here
            )
        except SpecError as error:
            problems += error.problems
        else:
            problems += file_problems
            warnings += file_warnings
    return problems, warnings


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        write_message(f"warning: {warning}")


def load_for_train(job: Path, overrides: Sequence[str], workers_here: bool) -> JobSpec:
    """Load a job to train from this machine, and print warnings.

    Raises:
        SpecError: With every problem of the file and of the paths it uses.
    """
    spec, warnings = loader.load_with_warnings(
        job, overrides, lambda spec: refusals(spec, workers_here), unusual
    )
    print_warnings(warnings)
    return spec


def load_for_submit(job: Path, overrides: Sequence[str]) -> JobSpec:
    """Load a job to train elsewhere, and print warnings.

    Raises:
        SpecError: With every problem of the file.
    """
    spec, warnings = loader.load_with_warnings(job, overrides, none, unusual)
    print_warnings(warnings)
    return spec
