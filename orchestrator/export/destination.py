"""Where an export may be written: never over anything that is not an earlier export.

DIR/.orchestrator-export.json          marker: every file of the export, with size and SHA-256
.orchestrator-export-1f0c.../new       the export while it is written, in a folder of its own beside DIR
.orchestrator-export-1f0c.../old       what DIR held, for the moment between two renames
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
from typing import Any

from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError

MARKER = ".orchestrator-export.json"
_HOLDER = ".orchestrator-export-"
_OWNER = "owner.json"
_HASHED_WHOLE_BYTES = 64 * 2**20
# Of larger files both ends are hashed: names and shapes of tensors, and the last tensor.
_HASHED_END_BYTES = 2**20
_EXPORT_OF_A_RUN = re.compile(r"export(-[0-9]+)?")
_OF_A_RUN = ("checkpoints", "attempts.jsonl", "steps.jsonl", "data.json")
_SHOWN = 3


def target_problem(to: Path, run: Path, job: JobSpec) -> str | None:
    """Return why an export must not be written to a folder, with the remedy; None where it may.

    Args:
        to: The folder as given; a symbolic link stands for what it points to.
        run: Folder of the run that is exported.
        job: Its job: model, adapter and data must not be overwritten either.
    """
    target = Path(os.path.realpath(to.expanduser()))
    reason = _wrong_place(target, run, job)
    if reason is None and target.is_dir():
        if os.path.ismount(target):
            reason = "is a mount point, which no rename can replace; name a folder inside it"
        elif foreign := foreign_entries(target):
            shown = ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")
            reason = (
                f"is not empty and holds what no export wrote ({len(foreign)} "
                f"{'entries' if len(foreign) > 1 else 'entry'}: {shown}); name a folder that is not there yet"
            )
    return None if reason is None else f"{to} {reason}"


def require_target(to: Path, run: Path, job: JobSpec) -> Path:
    """Return the real path of a folder that an export may be written to.

    Raises:
        SpecError: It may not; nothing was changed.
    """
    if problem := target_problem(to, run, job):
        raise SpecError(f"--to {problem}")
    return Path(os.path.realpath(to.expanduser()))


def free_target(run: Path, job: JobSpec) -> tuple[Path, str | None]:
    """Return where a finished run exports to: `export`, or the first of export-2, export-3, ... that may be.

    A run that trained for days must not end without an export because of a stray file.

    Returns:
        The folder, and why it is not `export`, None where it is.
    """
    first = run / "export"
    problem = target_problem(first, run, job)
    if problem is None:
        return first, None
    others = (run / f"export-{number}" for number in count(2))
    return next(each for each in others if target_problem(each, run, job) is None), problem


def _wrong_place(target: Path, run: Path, job: JobSpec) -> str | None:
    """Return why no export may stand at a path, whatever lies there now."""
    if target.exists() and not target.is_dir():
        return "is a file; name a folder"
    if blocking := next((each for each in target.parents if each.exists() and not each.is_dir()), None):
        return f"lies below {blocking}, which is a file; name another folder"
    kept = _of_the_user() | _used_by(job, run)
    for what, path in kept.items():
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents:
            verb = "is" if target == real else "holds"
            return f"{verb} {what} ({path}), which the export would replace; name a folder of its own"
    own = Path(os.path.realpath(run))
    for above in target.parents:
        is_export = above == own and target.parent == own and _EXPORT_OF_A_RUN.fullmatch(target.name)
        if (above == own or _is_run(above)) and not is_export:
            return f"lies inside the run {above}; name a folder outside of it, or {run / 'export'}"
    return None


def _of_the_user() -> dict[str, Path]:
    found = {}
    with suppress(OSError):  # it was removed
        found["the working directory"] = Path.cwd()
    with suppress(RuntimeError):  # a user without an entry, as containers have
        found["the home directory"] = Path.home()
    return found


def _used_by(job: JobSpec, run: Path) -> dict[str, Path]:
    """Return the files and folders that a job reads or keeps, by what they are."""
    sources = (*job.data.train, *(job.eval.data if job.eval else ()))
    named = {
        "the base model": job.model.path,
        "the adapter that the run started from": job.method.adapter,
        "parallel.offload_path": job.parallel.offload_path,
        **{f"the data {Path(source.path).name}": source.path for source in sources},
    }
    local = {what: resolve(str(path)) for what, path in named.items() if path}
    found = {what: path for what, path in local.items() if path.exists()}
    return {"the run": run, **found}


def _is_run(folder: Path) -> bool:
    return (folder / "job.yaml").is_file() and any((folder / name).exists() for name in _OF_A_RUN)


def foreign_entries(folder: Path) -> list[str]:
    """Return what lies in a folder and was not written by the export that its marker tells of, sorted.

    Of a folder without a marker that is all; a file of ours that was changed since counts as foreign.
    """
    listed = _listed(folder)
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            known = any(each.startswith(f"{name}/") for each in listed)
        else:
            known = (name == MARKER and bool(listed)) or (
                name in listed and _is_as_written(path, listed[name])
            )
        if not known:
            found.append(f"{name} (changed since it was exported)" if name in listed else name)
    return found


def _listed(folder: Path) -> Mapping[str, Any]:
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _is_as_written(path: Path, entry: Any) -> bool:
    try:
        return not path.is_symlink() and describe(path) == entry
    except OSError:
        return False


def describe(path: Path) -> dict[str, Any]:
    """Return size and hash of a file; of a large one the hash of its two ends."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_HASHED_END_BYTES))
            file.seek(size - _HASHED_END_BYTES)
            digest.update(file.read())
    return {"bytes": size, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Draft:
    """An export that is being written, in a folder that nobody else has.

    Attributes:
        target: The folder that it is going to be.
        folder: Where it is written.
        scratch: For what is needed only meanwhile.
    """

    target: Path
    folder: Path
    scratch: Path

    def publish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the marker, give files the rights of the umask, and rename the draft to its target.

        Args:
            about: What the marker says of the export, beside its files.

        Returns:
            Size and hash by file, without the marker.

        Raises:
            SpecError: The target holds by now what no export wrote; it is left as it is.
            OSError: The draft cannot be renamed; the target is left as it is.
        """
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = {path.relative_to(self.folder).as_posix(): describe(path) for path in paths}
        marker = self.folder / MARKER
        marker.write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")
        mode = marker.stat().st_mode & 0o777
        for path in paths:  # some libraries write through private temporary files
            if path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)
        old = self.folder.with_name("old")
        if not self.target.is_dir():
            self.folder.rename(self.target)
            return files
        if not (self.target / MARKER).exists():  # an empty folder that somebody made as he wants it
            shutil.copymode(self.target, self.folder)
        self.target.rename(old)
        try:
            if foreign := foreign_entries(old):
                raise SpecError(
                    f"{self.target} holds what no export wrote ({', '.join(foreign[:_SHOWN])}), which came "
                    "while this one was written; move it away, or name another folder with --to"
                )
            self.folder.rename(self.target)
        except BaseException:
            old.rename(self.target)
            raise
        return files


@contextmanager
def draft_of(target: Path) -> Iterator[Draft]:
    """Give a draft of a folder, and remove what it leaves when it is done or failed.

    What an export left that was killed is removed first; what it had moved away returns to its place.

    Args:
        target: The folder, a real path.
    """
    made = _make_parents(target.parent)
    try:
        _recover(target.parent)
        holder = target.parent / f"{_HOLDER}{uuid.uuid4().hex}"
        holder.mkdir()
        try:
            for name in ("new", "scratch"):
                (holder / name).mkdir()
            with (holder / _OWNER).open("w", encoding="utf-8") as owner:
                with suppress(OSError):  # a file system without locks; the process id has to do there
                    flock(owner, LOCK_EX | LOCK_NB)
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "target": target.name}, owner)
                owner.flush()
                yield Draft(target, holder / "new", holder / "scratch")
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    finally:
        for folder in made:  # of no use where the export failed; one that holds something stays
            with suppress(OSError):
                folder.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with its parents; return those that are new, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _recover(parent: Path) -> None:
    """Remove the drafts of exports that were killed on this machine."""
    for holder in parent.glob(f"{_HOLDER}*"):
        with suppress(OSError, ValueError, KeyError, TypeError), (holder / _OWNER).open("r+") as file:
            owner = json.load(file)
            if owner["host"] != socket.gethostname() or Path(f"/proc/{int(owner['pid'])}").exists():
                continue
            flock(file, LOCK_EX | LOCK_NB)  # fails where it lives, in a container with a name like ours
            old, target = holder / "old", parent / Path(str(owner["target"])).name
            if old.is_dir() and not target.exists():
                old.rename(target)
            shutil.rmtree(holder, ignore_errors=True)
