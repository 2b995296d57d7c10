"""The exception tree: whose mistake it was, and the exit code that says so."""

from __future__ import annotations

from typing import Any


class OrchestratorError(Exception):
    """A failure with one or more problems, each a sentence that names the value, the rule and the remedy.

    Args:
        *problems: The sentences, all that were found and not only the first.
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling: Ray carries errors from workers to the driver."""
        return (type(self), self.problems)


class SpecError(OrchestratorError):
    """The job file, or a file that it names, is wrong (exit code 2)."""

    exit_code = 2
    title = "job file error"


class ClusterError(OrchestratorError):
    """The machines cannot run the job: too few, unreachable, a port or a storage in the way (exit code 3)."""

    exit_code = 3
    title = "cluster error"


class TrainingError(OrchestratorError):
    """The run itself failed after it was started (exit code 4)."""

    exit_code = 4
    title = "training error"


class MemoryExhaustedError(TrainingError):
    """A worker needed more memory than it may have (exit code 4)."""
