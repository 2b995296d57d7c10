"""One writer a run: a driver holds a lease on the folder, and a newer one can tell whether it still lives."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import ClusterError

STALE_SECONDS = 60.0
_FILE = "owner.json"


@dataclass(frozen=True)
class Lease:
    """Who writes a run's folder.

    Attributes:
        owner: Name of the driver, new for each.
        host: Where it runs.
        pid: Its process.
    """

    owner: str
    host: str
    pid: int

    @classmethod
    def acquire(cls, folder: Path, wait_seconds: float = STALE_SECONDS + 5.0) -> Lease:
        """Take the lease, waiting for that of a driver that no longer refreshes it.

        Args:
            folder: The run's folder.
            wait_seconds: How long to wait for another driver's lease to grow stale.

        Raises:
            ClusterError: Another driver is alive and writes this run.
        """
        mine = cls(uuid.uuid4().hex, socket.gethostname(), os.getpid())
        deadline = time.monotonic() + wait_seconds
        while (other := _read(folder)) and _is_alive(other, folder):
            if time.monotonic() > deadline or (other.host == mine.host and _is_running(other.pid)):
                raise ClusterError(
                    f"the run in {folder} is being written by process {other.pid} on {other.host}; wait for "
                    "it, stop it, or give this job another name"
                )
            time.sleep(1.0)
        mine.refresh(folder)
        return mine

    def refresh(self, folder: Path) -> None:
        """Say that this driver still lives."""
        draft = folder / f".{_FILE}.{self.owner}"
        draft.write_text(json.dumps(asdict(self)), encoding="utf-8")
        draft.replace(folder / _FILE)

    def is_held(self, folder: Path) -> bool:
        """Tell whether no other driver has taken the run over."""
        return _read(folder) == self

    def release(self, folder: Path) -> None:
        """Give the lease back."""
        if self.is_held(folder):
            (folder / _FILE).unlink(missing_ok=True)


def _read(folder: Path) -> Lease | None:
    try:
        return Lease(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(lease: Lease, folder: Path) -> bool:
    """Judge by the file's age, and where it can be seen, by the process itself."""
    if lease.host == socket.gethostname() and not _is_running(lease.pid):
        return False
    try:
        return time.time() - (folder / _FILE).stat().st_mtime < STALE_SECONDS
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
