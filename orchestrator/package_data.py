"""Paths of the data files of this package in a checkout, an installed wheel and Ray's working_dir.

ADR 12 says why they are in top-level folders of the repository and not inside the package.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""Folder of the import package `orchestrator`."""
ROOT = PACKAGE.parent
"""Parent folder of the package: the root of a checkout, site-packages, or Ray's working_dir."""
RESOURCES = ("ds_configs", "launch/jobs", "cluster/catalogue.toml")
"""Data files of top-level folders of the repository that the program reads at run time."""
BUNDLED = PACKAGE / "_bundled"
"""Copies of `RESOURCES` in a wheel and in a submitted working_dir; a checkout has no such folder."""


def resource(name: str) -> Path:
    """Return the path of a data file or folder of this package.

    Args:
        name: One of `RESOURCES`, or a path below one, such as `launch/jobs/quickstart.yaml`.
    """
    return (BUNDLED if BUNDLED.is_dir() else ROOT) / name
