"""Loads job files for commands, with problems and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.checks.job import all_problems, no_file_checks, spec_problems
from orchestrator.checks.warnings import job_warnings, local_warnings
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
                path, overrides, all_problems if files else no_file_checks, local_warnings
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
        job, overrides, lambda spec: spec_problems(spec, workers_here), job_warnings
    )
    print_warnings(warnings)
    return spec


def load_for_submit(job: Path, overrides: Sequence[str]) -> JobSpec:
    """Load a job to train elsewhere, and print warnings.

    Raises:
        SpecError: With every problem of the file.
    """
    spec, warnings = loader.load_with_warnings(job, overrides, no_file_checks, job_warnings)
    print_warnings(warnings)
    return spec
