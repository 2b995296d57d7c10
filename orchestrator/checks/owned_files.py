"""Which files in a run's folder are ours, and how they are removed where somebody may have put his own."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from orchestrator.atomic_files import read_object
from orchestrator.config import loader
from orchestrator.errors import SpecError

_BEGUN = "attempts.jsonl"
_BEFORE_THE_JOB = {"data.json": "train", "base.json": "config", "plan.json": "machines"}  # and a key of each
_WRITTEN = (
    "job.yaml",
    *_BEFORE_THE_JOB,
    "deepspeed.json",
    "workers.json",
    "steps.jsonl",
    "evaluations.jsonl",
    "metrics.json",
    "report.json",
)
RUN_FILES = (
    *_WRITTEN,
    _BEGUN,
    "owner.json",
    "wandb_id",
    "mlflow_id",
    "checkpoint_manager_snapshot.json",
    ".validate_storage_marker",
)
"""Names of the files that a run, and Ray Train for it, writes into its folder; checkpoints and exports are
folders."""


def overwritten_by_a_run(run_dir: Path) -> str | None:
    """Return a file that the first start of a run would overwrite and that no start of a run wrote.

    A start that failed before the first attempt left its job as the program writes it, or files that come
    before the job, which are known by a key that ours have.

    Args:
        run_dir: The run's folder.
    """
    if (run_dir / _BEGUN).exists() or _is_job_as_written(run_dir / "job.yaml"):
        return None
    there = [name for name in _WRITTEN if (run_dir / name).exists()]
    return next((name for name in there if not _has_our_key(run_dir / name)), None)


def _has_our_key(file: Path) -> bool:
    key = _BEFORE_THE_JOB.get(file.name)
    return key is not None and key in (read_object(file) or {})


def _is_job_as_written(file: Path) -> bool:
    try:
        return loader.dump(loader.load(file)) == file.read_text(encoding="utf-8")
    except (OSError, ValueError, SpecError):
        return False


def remove_own(folder: Path, names: Collection[str]) -> None:
    """Remove files from a folder, and the folder itself where nothing else is left.

    Args:
        folder: It may be gone already.
        names: Files of ours, relative to the folder; folders that held only these are removed as well.
    """
    for name in names:
        with suppress(OSError):  # gone, or a folder that somebody gave the name
            (folder / name).unlink()
    within = {parent for name in names for parent in Path(name).parents}
    for each in sorted(within, key=lambda parent: len(parent.parts), reverse=True):
        with suppress(OSError):  # not empty: it holds what is not ours
            (folder / each).rmdir()
    with suppress(OSError):
        folder.rmdir()


def move_others(folder: Path, names: Collection[str], into: Path) -> None:
    """Move the files of a folder that are not ours to the same places in another folder.

    Args:
        folder: Where they are.
        names: Files of ours, relative to the folder, which stay.
        into: Where they go; a file that is there already keeps its place, and the one of its name stays too.
    """
    for path in [each for each in folder.rglob("*") if not each.is_dir()]:
        name = path.relative_to(folder)
        target = into / name
        if name.as_posix() in names or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for emptied in sorted((each for each in folder.rglob("*") if each.is_dir()), reverse=True):
        with suppress(OSError):  # not empty
            emptied.rmdir()
