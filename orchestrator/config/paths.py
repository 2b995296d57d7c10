"""Where a path in a job file leads: a file or folder on disk, or what this package ships."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from orchestrator.package_data import PACKAGE, ROOT

_BUILTIN = "builtin/"
_UNPACKED = re.compile(r"^/.*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def as_submitted(path: str) -> str:
    """Return a path without the folder into which Ray unpacked what travelled with a submitted job.

    That folder is named by a hash of all that travelled, in a session that is new with each start of Ray, so
    that data lie elsewhere whenever the same job is submitted again.
    """
    return _UNPACKED.sub("", path)


def module_command(module: str) -> list[str]:
    """Return the command that runs a module of this program in a process of its own.

    Without `-P`, Python searches the working directory first, where a project may have an `orchestrator`
    package of its own. In the root of a checkout `-P` is left out: the working directory may be the only way
    to find this package there.
    """
    safe = [] if Path.cwd() == ROOT else ["-P"]
    return [sys.executable, *safe, "-m", module]


def resolve(path: str) -> Path:
    """Return where a data file or a model folder lies.

    Args:
        path: A path, relative to the working directory, or `builtin/NAME` for what this package ships.

    Returns:
        The path on disk; it may not exist.
    """
    if path.startswith(_BUILTIN):
        folder = PACKAGE / "builtin"
        name = path.removeprefix(_BUILTIN)
        return next(
            (each for each in (folder / name, folder / f"{name}.jsonl") if each.exists()), folder / name
        )
    return Path(os.path.expanduser(path))  # an unknown ~user stays as it is and is reported as not found
