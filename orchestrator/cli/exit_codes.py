"""How a command ends: its exit code, and what it says when it did not succeed."""

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
    """Say on stderr why a command ends, and end it with an exit code."""
    write_message(text)
    raise typer.Exit(code)


def _stopped(text: str) -> NoReturn:
    write_message(text)
    shutdown.leave()


@contextmanager
def exit_codes(interrupted: str = "nothing was changed") -> Iterator[None]:
    """Turn errors into one block on stderr and an exit code.

    2 file, 3 machines, 4 run, 130 Ctrl-C, 143 SIGTERM or SIGHUP, 1 a fault of this program.

    Args:
        interrupted: What a user is told who ends the command.
    """
    choose_auth_mode()  # before a command imports Ray
    try:
        with shutdown.interruptible(interrupted):
            yield
    except KeyboardInterrupt as error:
        name = shutdown.received()
        if name:
            _stopped(f"stopped by {name}: {error if str(error) else interrupted}")
        fail(f"interrupted: {interrupted}", 130)
    except typer.Exit:
        raise
    except Exception as error:
        name = shutdown.received()
        if name:  # what broke off when the command was told to end
            _stopped(f"stopped by {name}: {interrupted}")
        if isinstance(error, OrchestratorError):
            fail(str(error), error.exit_code)
        fail(describe_unexpected(error), _UNEXPECTED)
