"""The list of live endpoints of a machine, as files for Prometheus' file_sd: one a run, written by that run.

The folder is shared by all users of the machine, like /tmp. A run writes its file when its endpoint opens and
removes it when it closes; the file of a run that was killed is removed by whichever run comes next.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path

PLACE = "ORCHESTRATOR_TARGETS"
"""Environment variable with another folder than the default one; empty for none."""
DEFAULT = "/tmp/orchestrator-targets"  # k8s/monitoring/prometheus.yml reads it
_NAME = re.compile(r"\.?.+\.(\d+)\.(\d+)\.(\d+)\.json(\.draft)?")  # PID namespace, process, its start
_SECONDS_BETWEEN_TOUCHES = 3600.0  # whatever clears /tmp goes by age
_ANY_OR_OWN = frozenset({"", "0.0.0.0", "::", "127.0.0.1", "::1", "localhost"})


def folder(environ: Mapping[str, str]) -> Path | None:
    """Return where targets are listed; None where they are not."""
    named = environ.get(PLACE, DEFAULT)
    return Path(named) if named else None


class Target:
    """The entry of one endpoint, from its opening to its end.

    Args:
        place: The folder; made where it is missing.
        run: Name of the run.
        host: Address that the endpoint listens on.
        port: Its port.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, place: Path, run: str, host: str, port: int) -> None:
        pid = os.getpid()
        self._file = place / f"{run}.{_pid_namespace()}.{pid}.{_started(pid)}.json"
        # Labels that begin with two underscores are Prometheus' own way to tell more, and end no series.
        entry = {"targets": [address(host, port)], "labels": {"__meta_orchestrator_run": run}}
        self._text = json.dumps([entry]) + "\n"
        self._written = 0.0
        _open_to_all(place)
        _remove_stale(place)
        self.keep()

    def keep(self) -> None:
        """Write the file, unless that was done within the hour and it is still there.

        Raises:
            OSError: It cannot be written.
        """
        if time.monotonic() - self._written < _SECONDS_BETWEEN_TOUCHES and self._file.exists():
            return
        draft = self._file.with_name(f".{self._file.name}.draft")
        draft.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o644), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask: Prometheus is another user
            file.write(self._text)
        draft.replace(self._file)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Take the endpoint off the list."""
        self._file.unlink(missing_ok=True)


def address(host: str, port: int) -> str:
    """Return where a Prometheus on the same machine reaches an endpoint."""
    if host in _ANY_OR_OWN:
        return f"localhost:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _open_to_all(place: Path) -> None:
    """Make a folder in which everybody may write, and nobody may remove what is another's."""
    try:
        place.mkdir(parents=True)
        place.chmod(0o1777)
    except FileExistsError:
        if not stat.S_ISDIR(place.lstat().st_mode) and place == Path(DEFAULT):
            raise NotADirectoryError(20, "it is no folder, and everybody may write into /tmp") from None


def _remove_stale(place: Path) -> None:
    """Remove the files of processes that are no more; another container's cannot be judged from here."""
    here = _pid_namespace()
    for file in place.iterdir():
        matched = _NAME.fullmatch(file.name)
        if matched is None or int(matched[1]) != here:
            continue
        if _started(int(matched[2])) != int(matched[3]):
            try:
                file.unlink(missing_ok=True)
            except OSError:  # another user's, whose next run removes it
                continue


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since the machine did; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
