"""Files that this program writes into a run directory, and removal that keeps files of the user."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from orchestrator.atomic_files import read_object
from orchestrator.config import loader
from orchestrator.errors import SpecError

_ATTEMPTS = "attempts.jsonl"
# Files that may exist before job.yaml, each with a key by which it is recognized.
_WRITTEN_BEFORE_JOB = {"data.json": "train", "base.json": "config", "plan.json": "machines"}
_WRITTEN = (
    "job.yaml",
    *_WRITTEN_BEFORE_JOB,
    "deepspeed.json",
    "workers.json",
    "steps.jsonl",
    "evaluations.jsonl",
    "metrics.json",
    "report.json",
)
RUN_FILES = (
    *_WRITTEN,
    _ATTEMPTS,
    "owner.json",
    "wandb_id",
    "mlflow_id",
    "checkpoint_manager_snapshot.json",
    ".validate_storage_marker",
)
"""File names that a run, or Ray Train for it, writes into the run directory; checkpoints and exports are
folders."""


def overwritten_by_a_run(run_dir: Path) -> str | None:
    """Return the name of a file of the user that a new run would overwrite; None if there is none.

    A start that failed before its first attempt leaves job.yaml as `loader.dump` writes it, or files that
    are written before job.yaml, which are recognized by one of their keys.

    Args:
        run_dir: The run directory.
    """
    if (run_dir / _ATTEMPTS).exists() or _is_job_as_written(run_dir / "job.yaml"):
        return None
    existing = [name for name in _WRITTEN if (run_dir / name).exists()]
    return next((name for name in existing if not _has_known_key(run_dir / name)), None)


def _has_known_key(file: Path) -> bool:
    key = _WRITTEN_BEFORE_JOB.get(file.name)
    return key is not None and key in (read_object(file) or {})


def _is_job_as_written(file: Path) -> bool:
    try:
        return loader.dump(loader.load(file)) == file.read_text(encoding="utf-8")
    except (OSError, ValueError, SpecError):
        return False


def remove_own(folder: Path, names: Collection[str]) -> None:
    """Remove files of this program from a folder, then the folder if it is empty.

    Args:
        folder: The folder; it may not exist.
        names: Files to remove, relative to the folder; subfolders that become empty are removed too.
    """
    for name in names:
        with suppress(OSError):  # missing, or a folder of the user with that name
            (folder / name).unlink()
    subfolders = {parent for name in names for parent in Path(name).parents}
    for subfolder in sorted(subfolders, key=lambda parent: len(parent.parts), reverse=True):
        with suppress(OSError):  # not empty: it contains files of the user
            (folder / subfolder).rmdir()
    with suppress(OSError):
        folder.rmdir()


def move_others(folder: Path, names: Collection[str], into: Path) -> None:
    """Move files of the user to the same relative paths in another folder.

    Args:
        folder: The source folder.
        names: Files of this program, relative to the folder; they are not moved.
        into: The destination; existing files are not overwritten, and their namesakes are not moved.
    """
    for path in [path for path in folder.rglob("*") if not path.is_dir()]:
        name = path.relative_to(folder)
        target = into / name
        if name.as_posix() in names or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for subfolder in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):  # not empty
            subfolder.rmdir()
