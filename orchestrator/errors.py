"""Exceptions: the subclass says whether the job file, the cluster or the run failed, with the exit code."""

from __future__ import annotations


class OrchestratorError(Exception):
    """Base class, with one or more problems.

    Args:
        *problems: All problems that were found, each a message with value, rule and remedy.
    """

    exit_code = 1
    title = "error"

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.title}: {self.problems[0]}"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{self.title}: {len(self.problems)} problems\n{lines}"

    def __reduce__(self) -> tuple[type[OrchestratorError], tuple[str, ...]]:
        """Pickle the problems: Ray sends errors from workers to the driver."""
        return (type(self), self.problems)


class SpecError(OrchestratorError):
    """The job file, or a file that it refers to, is invalid (exit code 2)."""

    exit_code = 2
    title = "job file error"


class ClusterError(OrchestratorError):
    """The cluster cannot run the job: resources, network, ports or storage (exit code 3)."""

    exit_code = 3
    title = "cluster error"


class TrainingError(OrchestratorError):
    """The run failed after it was started (exit code 4)."""

    exit_code = 4
    title = "training error"


class MemoryExhaustedError(TrainingError):
    """A worker exceeded its memory limit (exit code 4)."""
