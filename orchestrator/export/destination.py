"""The target directory of an export: an earlier export is replaced atomically, anything else never.

DIR/.orchestrator-export.json          marker: every file of the export, with size and SHA-256
.orchestrator-export-1f0c.../new       the export while it is written, in a directory next to DIR
.orchestrator-export-1f0c.../old       the earlier export, between two renames
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from itertools import count
from pathlib import Path
from typing import TypedDict

from orchestrator.config.eval_sets import all_sources
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError

MARKER = ".orchestrator-export.json"
_DRAFT_PREFIX = ".orchestrator-export-"
_OWNER = "owner.json"
_MAX_HASHED_BYTES = 64 * 2**20
# Of larger files the first and last MiB are hashed: tensor names and shapes, and the end of the data.
_HASHED_END_BYTES = 2**20
_RUN_EXPORT = re.compile(r"export(-[0-9]+)?")
_RUN_FILES = ("checkpoints", "attempts.jsonl", "steps.jsonl", "data.json")
_MAX_SHOWN = 3


class FileEntry(TypedDict):
    """A file in the marker: size and hash."""

    bytes: int
    sha256: str


def target_problem(to: Path, run_dir: Path, job: JobSpec) -> str | None:
    """Return why an export must not be written to a directory, with the remedy; None if it may.

    Args:
        to: The directory as given; a symbolic link is followed.
        run_dir: Directory of the exported run.
        job: Its job, whose model, adapter and data must not be overwritten.
    """
    target = Path(os.path.realpath(to.expanduser()))
    reason = _location_problem(target, run_dir, job)
    if reason is None and target.is_dir():
        if os.path.ismount(target):
            reason = "is a mount point and cannot be replaced by a rename; name a directory inside it"
        elif foreign := foreign_entries(target):
            shown = ", ".join(foreign[:_MAX_SHOWN]) + (", ..." if len(foreign) > _MAX_SHOWN else "")
            reason = (
                f"is not empty and contains files that are not part of an export ({len(foreign)}: {shown}); "
                "name a directory that does not exist yet"
            )
    return None if reason is None else f"{to} {reason}"


def require_target(to: Path, run_dir: Path, job: JobSpec) -> Path:
    """Return the real path of a directory to which an export may be written.

    Raises:
        SpecError: The export must not be written there; nothing was changed.
    """
    if problem := target_problem(to, run_dir, job):
        raise SpecError(f"--to {problem}")
    return Path(os.path.realpath(to.expanduser()))


def free_target(run_dir: Path, job: JobSpec) -> tuple[Path, str | None]:
    """Return where a finished run is exported to: `export`, or the first usable of export-2, export-3, ...

    A run that trained for days must not end without an export because of a stray file.

    Returns:
        The directory, and why it is not `export`; None if it is.
    """
    first = run_dir / "export"
    problem = target_problem(first, run_dir, job)
    if problem is None:
        return first, None
    candidates = (run_dir / f"export-{number}" for number in count(2))
    return next(path for path in candidates if target_problem(path, run_dir, job) is None), problem


def _location_problem(target: Path, run_dir: Path, job: JobSpec) -> str | None:
    """Return why no export may be written to a path, whatever it contains."""
    if target.exists() and not target.is_dir():
        return "is a file; name a directory"
    if file := next((path for path in target.parents if path.exists() and not path.is_dir()), None):
        return f"is below {file}, which is a file; name another directory"
    for what, path in (_user_directories() | _job_paths(job, run_dir)).items():
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents:
            verb = "is" if target == real else "contains"
            return f"{verb} {what} ({path}), which the export would replace; name another directory"
    own_run = Path(os.path.realpath(run_dir))
    for parent in target.parents:
        is_export = parent == own_run and target.parent == own_run and _RUN_EXPORT.fullmatch(target.name)
        if (parent == own_run or _is_run(parent)) and not is_export:
            return f"is inside the run {parent}; name a directory outside of it, or {run_dir / 'export'}"
    return None


def _user_directories() -> dict[str, Path]:
    directories = {}
    with suppress(OSError):  # the working directory was removed
        directories["the working directory"] = Path.cwd()
    with suppress(RuntimeError):  # the user has no entry in passwd, as in some containers
        directories["the home directory"] = Path.home()
    return directories


def _job_paths(job: JobSpec, run_dir: Path) -> dict[str, Path]:
    """Return the existing paths that a job reads or writes, by description."""
    names = {
        "the base model": job.model.path,
        "the adapter that the run started from": job.method.adapter,
        "parallel.offload_path": job.parallel.offload_path,
        **{f"the data {Path(source.path).name}": source.path for _, source in all_sources(job)},
    }
    paths = {what: resolve(str(name)) for what, name in names.items() if name}
    return {"the run": run_dir, **{what: path for what, path in paths.items() if path.exists()}}


def _is_run(directory: Path) -> bool:
    return (directory / "job.yaml").is_file() and any((directory / name).exists() for name in _RUN_FILES)


def foreign_entries(directory: Path) -> list[str]:
    """Return what a directory contains that is not an unchanged file of the export in its marker, sorted.

    Without a marker that is everything.
    """
    listed = _listed_files(directory)
    foreign = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir() and not path.is_symlink():
            is_ours = any(file.startswith(f"{name}/") for file in listed)
        elif name == MARKER:
            is_ours = bool(listed)
        else:
            is_ours = name in listed and _is_unchanged(path, listed[name])
        if not is_ours:
            foreign.append(f"{name} (changed since it was exported)" if name in listed else name)
    return foreign


def _listed_files(directory: Path) -> Mapping[str, object]:
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _is_unchanged(path: Path, entry: object) -> bool:
    try:
        return not path.is_symlink() and describe(path) == entry
    except OSError:
        return False


def describe(path: Path) -> FileEntry:
    """Return the size of a file and a hash of its content; of a large file a hash of its two ends."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _MAX_HASHED_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_HASHED_END_BYTES))
            file.seek(size - _HASHED_END_BYTES)
            digest.update(file.read())
    return {"bytes": size, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Draft:
    """An export that is being written.

    Attributes:
        target: The directory to publish to.
        directory: Where the export is written.
        scratch: For temporary files, which are not published.
    """

    target: Path
    directory: Path
    scratch: Path

    def publish(self, properties: Mapping[str, object]) -> dict[str, FileEntry]:
        """Write the marker, set file permissions by the umask, and rename the draft to its target.

        Args:
            properties: What the marker says of the export in addition to its files.

        Returns:
            Size and hash by file, without the marker.

        Raises:
            SpecError: The target now contains files that are not part of an export; it is unchanged.
            OSError: The draft cannot be renamed; the target is unchanged.
        """
        paths = sorted(path for path in self.directory.rglob("*") if path.is_file())
        files = {path.relative_to(self.directory).as_posix(): describe(path) for path in paths}

        marker = self.directory / MARKER  # atomic by the rename of the directory
        marker.write_text(json.dumps({**properties, "files": files}, indent=1) + "\n", encoding="utf-8")
        mode = marker.stat().st_mode & 0o777
        for path in paths:  # safetensors creates its files with mode 600
            if path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)
        if not self.target.is_dir():
            self.directory.rename(self.target)
        else:
            self._replace_target()
        return files

    def _replace_target(self) -> None:
        """Move the target aside, check it again, and rename the draft to it."""
        old = self.directory.with_name("old")
        if not (self.target / MARKER).exists():  # an empty directory of the user: keep its permissions
            shutil.copymode(self.target, self.directory)
        self.target.rename(old)
        try:
            # Checked after the rename: nobody writes to the old path any more.
            if foreign := foreign_entries(old):
                raise SpecError(
                    f"{self.target} now contains files that are not part of an export "
                    f"({', '.join(foreign[:_MAX_SHOWN])}), added while this one was written; move them away, "
                    "or name another directory with --to"
                )
            self.directory.rename(self.target)
        except BaseException:
            old.rename(self.target)
            raise


@contextmanager
def open_draft(target: Path) -> Iterator[Draft]:
    """Create a draft for a target, and remove what is left of it afterwards.

    Drafts of killed exports are removed first; an earlier export that they had moved aside is restored.

    Args:
        target: The directory to publish to, a real path.
    """
    created = _create_parents(target.parent)
    try:
        _remove_stale_drafts(target.parent)
        draft = target.parent / f"{_DRAFT_PREFIX}{uuid.uuid4().hex}"
        draft.mkdir()
        try:
            for name in ("new", "scratch"):
                (draft / name).mkdir()
            with (draft / _OWNER).open("w", encoding="utf-8") as owner:
                with suppress(OSError):  # no locks on this file system: the process id has to do
                    flock(owner, LOCK_EX | LOCK_NB)
                # Not atomic: the file is locked, so it must be this one and not a renamed copy.
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "target": target.name}, owner)
                owner.flush()
                yield Draft(target, draft / "new", draft / "scratch")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        for directory in created:  # still empty if the export failed
            with suppress(OSError):
                directory.rmdir()


def _create_parents(directory: Path) -> list[Path]:
    """Create a directory with its parents; return those that are new, innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_stale_drafts(parent: Path) -> None:
    """Remove the drafts of exports that were killed on this machine."""
    for draft in parent.glob(f"{_DRAFT_PREFIX}*"):
        with suppress(OSError, ValueError, KeyError, TypeError), (draft / _OWNER).open("r+") as file:
            owner = json.load(file)
            if owner["host"] != socket.gethostname() or Path(f"/proc/{int(owner['pid'])}").exists():
                continue
            # Fails if the owner is alive, in a container with our host name and another PID namespace.
            flock(file, LOCK_EX | LOCK_NB)
            old, target = draft / "old", parent / Path(str(owner["target"])).name
            if old.is_dir() and not target.exists():
                old.rename(target)
            shutil.rmtree(draft, ignore_errors=True)
