"""Paths of a job file: files and folders on disk, and `builtin/` names of data in this package."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from orchestrator.package_data import PACKAGE, ROOT

_BUILTIN = "builtin/"
_UNPACKED = re.compile(r"^/.*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def as_submitted(path: str) -> str:
    """Return a path without the prefix of Ray's unpacked working_dir.

    The folder is named by a hash of the uploaded files and the Ray session, so that paths of the same job
    differ whenever it is submitted again.
    """
    return _UNPACKED.sub("", path)


def module_command(module: str) -> list[str]:
    """Return the command that runs a module of this package in a subprocess.

    Without `-P`, Python searches the working directory first, which may contain another package named
    `orchestrator`. In the root of a checkout `-P` is omitted, because this package may be importable only
    from the working directory.
    """
    safe = [] if Path.cwd() == ROOT else ["-P"]
    return [sys.executable, *safe, "-m", module]


def resolve(path: str) -> Path:
    """Return the location of a data file or a model folder.

    Args:
        path: A path, relative to the working directory, or `builtin/NAME` for data of this package.

    Returns:
        The path on disk; it may not exist.
    """
    if path.startswith(_BUILTIN):
        folder = PACKAGE / "builtin"
        name = path.removeprefix(_BUILTIN)
        candidates = (folder / name, folder / f"{name}.jsonl")
        return next((candidate for candidate in candidates if candidate.exists()), folder / name)
    return Path(os.path.expanduser(path))  # an unknown ~user is unchanged and reported as not found
