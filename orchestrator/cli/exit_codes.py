"""Exit codes and error output of commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from orchestrator import shutdown
from orchestrator.cli.output import describe_unexpected, write_message
from orchestrator.cluster.auth import choose_auth_mode
from orchestrator.errors import OrchestratorError

_UNEXPECTED = 1


def fail(text: str, code: int) -> NoReturn:
    """Print an error to stderr and exit."""
    write_message(text)
    raise typer.Exit(code)


def _exit_by_signal(text: str) -> NoReturn:
    write_message(text)
    shutdown.leave()


@contextmanager
def exit_codes(interrupted: str = "nothing was changed") -> Iterator[None]:
    """Convert exceptions to an error message on stderr and an exit code.

    2 job file, 3 cluster, 4 training, 130 Ctrl-C, 143 SIGTERM or SIGHUP, 1 unexpected error.

    Args:
        interrupted: Message if the user interrupts the command.
    """
    choose_auth_mode()  # before a command imports Ray
    try:
        with shutdown.interruptible(interrupted):
            yield
    except KeyboardInterrupt as error:
        name = shutdown.received()
        if name:
            _exit_by_signal(f"stopped by {name}: {error if str(error) else interrupted}")
        fail(f"interrupted: {interrupted}", 130)
    except typer.Exit:
        raise
    except Exception as error:
        name = shutdown.received()
        if name:  # an error caused by the signal
            _exit_by_signal(f"stopped by {name}: {interrupted}")
        if isinstance(error, OrchestratorError):
            fail(str(error), error.exit_code)
        fail(describe_unexpected(error), _UNEXPECTED)
