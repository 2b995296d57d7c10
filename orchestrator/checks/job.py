"""Everything that can be found wrong with a job here, before anything is started or made."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.checks.folders import folder_problems, run_problems
from orchestrator.checks.inputs import input_problems
from orchestrator.checks.models import model_problems
from orchestrator.checks.packages import package_problems
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import Problem


def none(_: JobSpec) -> Iterator[Problem]:
    """Look at nothing beyond the job's fields: it is to run elsewhere."""
    yield from ()


def all_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield what stands in the way of training a job on this machine: inputs, an earlier run, folders."""
    yield from _file_problems(job)
    yield from folder_problems(job)


def refusals(job: JobSpec, workers_here: bool = True) -> Iterator[Problem]:
    """Yield what makes a job's own file wrong, and with it what is wrong with the machine.

    A folder that cannot be written alone is no fault of the file: whoever makes it says so (exit code 3).

    Args:
        job: The job.
        workers_here: Whether workers run on this machine.
    """
    wrong = list(_file_problems(job))
    if wrong:
        yield from wrong
        yield from folder_problems(job, workers_here)


def _file_problems(job: JobSpec) -> Iterator[Problem]:
    yield from input_problems(job)
    yield from model_problems(job)
    yield from package_problems(job)
    yield from run_problems(job)
