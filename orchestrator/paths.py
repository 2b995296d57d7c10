"""Where a path in a job file leads: a file or folder on disk, or what this package ships."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

_BUILTIN = "builtin/"


def resolve(path: str) -> Path:
    """Return where a data file or a model folder lies.

    Args:
        path: A path, relative to the working directory, or `builtin/NAME` for what this package ships.

    Returns:
        The path on disk; it may not exist.
    """
    if path.startswith(_BUILTIN):
        folder = Path(str(resources.files("orchestrator"))) / "builtin"
        name = path.removeprefix(_BUILTIN)
        return next(
            (each for each in (folder / name, folder / f"{name}.jsonl") if each.exists()), folder / name
        )
    return Path(os.path.expanduser(path))  # an unknown ~user stays as it is and is reported as not found
