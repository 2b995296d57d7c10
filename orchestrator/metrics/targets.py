"""Target files for Prometheus' file-based service discovery, one per run on this machine.

The folder is shared by all users of the machine, like /tmp. A run writes its file when its endpoint opens and
removes it when it closes; the file of a killed run is removed by the next run that starts.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER_VARIABLE = "ORCHESTRATOR_TARGETS"
"""Environment variable that overrides the folder; empty disables target files."""
DEFAULT_FOLDER = "/tmp/orchestrator-targets"  # read by k8s/monitoring/prometheus.yml
_NAME = re.compile(r"\.?.+\.(\d+)\.(\d+)\.(\d+)\.json(\.draft)?")  # PID namespace, PID, process start time
_REFRESH_SECONDS = 3600.0  # cleaners of /tmp remove old files
_LOCAL_HOSTS = frozenset({"", "0.0.0.0", "::", "127.0.0.1", "::1", "localhost"})


def folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder for target files; None if they are disabled."""
    path = environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER)
    return Path(path) if path else None


class TargetFile:
    """The target file of one endpoint.

    Args:
        target_folder: Folder for target files; created if missing.
        run: Name of the run.
        host: Address that the endpoint listens on.
        port: Port of the endpoint.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, target_folder: Path, run: str, host: str, port: int) -> None:
        pid = os.getpid()
        self._file = target_folder / f"{run}.{_pid_namespace()}.{pid}.{_start_time(pid)}.json"
        # Prometheus drops labels with two leading underscores, so this label does not create new series.
        entry = {"targets": [address(host, port)], "labels": {"__meta_orchestrator_run": run}}
        self._text = json.dumps([entry]) + "\n"
        self._written = 0.0
        _create_shared_folder(target_folder)
        _remove_stale(target_folder)
        self.refresh()

    def refresh(self) -> None:
        """Write the file if it is missing or was written more than an hour ago.

        Raises:
            OSError: The file cannot be written.
        """
        if time.monotonic() - self._written < _REFRESH_SECONDS and self._file.exists():
            return
        # Not by `atomic_files.write_json`: the folder is world-writable, where another user could have put a
        # link in the place of the draft. O_EXCL and O_NOFOLLOW refuse to write through it.
        draft = self._file.with_name(f".{self._file.name}.draft")
        draft.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o644), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # independent of the umask: Prometheus runs as another user
            file.write(self._text)
        draft.replace(self._file)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)


def address(host: str, port: int) -> str:
    """Return HOST:PORT under which a Prometheus on the same machine reaches an endpoint."""
    if host in _LOCAL_HOSTS:
        return f"localhost:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _create_shared_folder(folder: Path) -> None:
    """Create a world-writable folder with the sticky bit, like /tmp."""
    try:
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
    except FileExistsError:
        if not stat.S_ISDIR(folder.lstat().st_mode) and folder == Path(DEFAULT_FOLDER):
            raise NotADirectoryError(20, "not a folder; any user can create files in /tmp") from None


def _remove_stale(folder: Path) -> None:
    """Remove files of dead processes in this PID namespace; those of other containers cannot be checked."""
    namespace = _pid_namespace()
    for file in folder.iterdir():
        matched = _NAME.fullmatch(file.name)
        if matched is None or int(matched[1]) != namespace:
            continue
        if _start_time(int(matched[2])) != int(matched[3]):
            try:
                file.unlink(missing_ok=True)
            except OSError:  # owned by another user, whose next run removes it
                continue


def _start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
