"""Fixtures of fault tests: a small disk, and a driver in the process of the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tokenising() -> Iterator[ModuleType]:
    """Start a local Ray in this process, so that functions of the driver can be replaced."""
    import ray

    from orchestrator.cluster.auth import choose_auth_mode
    from orchestrator.data import tokenize

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_AUTH_MODE", "")):
            patch.setenv(name, value)
        patch.delenv("RAY_AUTH_MODE")
        patch.delenv("RAY_ADDRESS", raising=False)
        choose_auth_mode()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=2)
        try:
            yield tokenize
        finally:
            ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of a given size in bytes, or resize it if it is mounted."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(size: int) -> Path:
        how = f"remount,size={size}" if os.path.ismount(folder) else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
        return folder

    try:
        yield resize
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "-l", str(folder)], check=True)
