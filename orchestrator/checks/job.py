"""All checks of a job against the files and packages of this machine, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.checks.folders import folder_problems, run_problems
from orchestrator.checks.inputs import input_problems
from orchestrator.checks.models import model_problems
from orchestrator.checks.packages import package_problems
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem


def no_file_checks(_: JobSpec) -> Iterator[Problem]:
    """Yield nothing: the check for a job that runs on another machine."""
    yield from ()


def all_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield all problems with inputs, packages, the run directory and folders on this machine."""
    yield from _file_problems(job)
    yield from folder_problems(job)


def spec_problems(job: JobSpec, workers_here: bool = True) -> Iterator[Problem]:
    """Yield problems of the job file, and if there are any, also those of unwritable folders.

    An unwritable folder alone is not an error of the job file (exit code 2): creating the run directory
    reports it as a ClusterError (exit code 3).

    Args:
        job: The job.
        workers_here: Whether workers run on this machine.
    """
    problems = list(_file_problems(job))
    if problems:
        yield from problems
        yield from folder_problems(job, workers_here)


def _file_problems(job: JobSpec) -> Iterator[Problem]:
    yield from input_problems(job)
    yield from model_problems(job)
    yield from package_problems(job)
    yield from run_problems(job)
