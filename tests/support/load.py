"""How tests share a machine with those that pytest-xdist runs at the same time."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PATIENCE = 2.0 * WORKERS if WORKERS > 1 else 1.0
"""Factor of time limits that only end what hangs."""

_NICENESS = 10
# Ray's workers, whose niceness is 15, would get hardly any time while other tests run; two of them may need
# more than 60 s to import torch.
RAY = {"RAY_worker_niceness": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"} if WORKERS > 1 else {}

_is_timed = False


@contextmanager
def timed(is_timed: bool = True) -> Iterator[None]:
    """Give processes that are started meanwhile priority over those of other tests."""
    global _is_timed
    before, _is_timed = _is_timed, is_timed
    try:
        yield
    finally:
        _is_timed = before


def niceness() -> int:
    """Return how much priority a new process leaves to what timed tests have started."""
    return _NICENESS if WORKERS > 1 and not _is_timed else 0


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """Make what the tests of all workers share, in the first worker that asks for it; the others wait.

    Args:
        factory: Pytest's, whose base folder has the same parent in all workers.
        name: Of its folder.
        make: Makes it in an empty folder, and returns what can be pickled.
    """
    if WORKERS == 1:
        return make(factory.mktemp(name))
    home = factory.getbasetemp().parent / name
    with (factory.getbasetemp().parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = home / "made.pickle"
        if not made.exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            made.write_bytes(pickle.dumps(make(home)))
        found: Made = pickle.loads(made.read_bytes())
    return found
