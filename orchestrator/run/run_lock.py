"""A lock on the run directory: one driver writes a run, and a later driver can tell whether it is alive.

The lock is a file, owner.json, that its driver rewrites every few seconds. flock would not do: the run
directory may be on a network file system that has no locks across nodes.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.atomic_files import write_json
from orchestrator.errors import ClusterError

STALE_SECONDS = 60.0
_FILE = "owner.json"


@dataclass(frozen=True)
class RunLock:
    """The driver that writes a run directory.

    Attributes:
        owner: Unique id of the driver.
        host: Host name of its machine.
        pid: Its process id.
    """

    owner: str
    host: str
    pid: int

    @classmethod
    def acquire(cls, run_dir: Path, wait_seconds: float = STALE_SECONDS + 5.0) -> RunLock:
        """Acquire the lock, waiting until that of a dead driver is stale.

        Args:
            run_dir: The run directory.
            wait_seconds: How long to wait for another driver's lock to become stale.

        Raises:
            ClusterError: Another driver is alive and writes this run.
        """
        lock = cls(uuid.uuid4().hex, socket.gethostname(), os.getpid())
        deadline = time.monotonic() + wait_seconds
        while (other := _read(run_dir)) and _is_alive(other, run_dir):
            if time.monotonic() > deadline or (other.host == lock.host and _is_running(other.pid)):
                raise ClusterError(
                    f"run {run_dir} is in use by process {other.pid} on {other.host}; wait for it to end, "
                    "stop it, or change name in the job file"
                )
            time.sleep(1.0)
        lock.refresh(run_dir)
        return lock

    def refresh(self, run_dir: Path) -> None:
        """Renew the lock; without it the lock becomes stale after STALE_SECONDS."""
        # A driver that was superseded may still refresh: each needs a draft of its own.
        write_json(run_dir / _FILE, asdict(self), draft_suffix=self.owner)

    def is_held(self, run_dir: Path) -> bool:
        """Return whether no other driver has taken over the run."""
        return _read(run_dir) == self

    def release(self, run_dir: Path) -> None:
        """Remove the lock, unless another driver has taken over."""
        if self.is_held(run_dir):
            (run_dir / _FILE).unlink(missing_ok=True)


def _read(run_dir: Path) -> RunLock | None:
    try:
        return RunLock(**json.loads((run_dir / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(lock: RunLock, run_dir: Path) -> bool:
    """Check the age of the lock file, and the process itself when it would be on this machine."""
    if lock.host == socket.gethostname() and not _is_running(lock.pid):
        return False
    try:
        return time.time() - (run_dir / _FILE).stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
