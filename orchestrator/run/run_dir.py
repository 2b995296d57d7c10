"""The run directory STORAGE/NAME: what it contains, and whether a job may start or resume in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.atomic_files import read_object, write_json, write_text
from orchestrator.checks.folders import ATTEMPTS, JOB, folder_problems, run_problems
from orchestrator.checks.folders import with_absolute_paths as with_absolute_paths
from orchestrator.checks.inputs import require_inputs as require_inputs
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError, TrainingError
from orchestrator.model.base_model_id import BASE_MODEL_FILE

DATA = "data.json"  # names of the packed datasets, and the files they were made from
CACHE = ".cache"  # tokenized and packed data, shared by the runs of a storage
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_RAY_MARKER = ".validate_storage_marker"  # Ray Train tests the storage with it and does not remove it
# Files that a start writes before its first attempt, in an order in which they can be removed.
_BEFORE_ATTEMPTS = (
    JOB, DATA, BASE_MODEL_FILE, "plan.json", "deepspeed.json", "owner.json", "logs/driver.log", "logs",
    "checkpoints",
)  # fmt: skip


def open_run(job: JobSpec, workers_here: bool = True) -> Path:
    """Return the run directory, created if it does not exist.

    Args:
        job: The job, with absolute paths.
        workers_here: Whether workers run on this machine.

    Raises:
        ClusterError: The storage is not writable.
        SpecError: The directory contains a run of another job.
    """
    run_dir = Path(job.checkpoint.storage) / job.name
    run_errors = [message for _, message in run_problems(job)]
    storage_errors = [message for _, message in folder_problems(job, workers_here)]
    if run_errors:
        raise SpecError(*run_errors, *storage_errors)
    if storage_errors:
        raise ClusterError(*storage_errors)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A temporary file without a name: it cannot collide with a file of the user.
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ClusterError(
            f"checkpoint.storage={job.checkpoint.storage} is not writable ({error.strerror}); name a "
            "directory that the driver and every node can write"
        ) from None
    return run_dir


def missing_directories(path: Path) -> list[Path]:
    """Return those of a directory and its parents that do not exist, innermost first."""
    return [directory for directory in (path, *path.parents) if not directory.exists()]


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove the directories that are empty, in the given order."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def discard_refused_run(run_dir: Path, created: Sequence[Path]) -> None:
    """Remove what a start wrote that was refused before its first attempt.

    Files that this program did not write stay, and so does a plan whose verdict explains the refusal.

    Args:
        run_dir: The run directory.
        created: The directories that this start created, the run directory first.
    """
    plan = read_object(run_dir / "plan.json") or {}
    if run_dir not in created or (run_dir / ATTEMPTS).exists() or plan.get("verdict") == "does not fit":
        return
    for name in _BEFORE_ATTEMPTS:
        with suppress(OSError):
            (run_dir / name).rmdir() if (run_dir / name).is_dir() else (run_dir / name).unlink()
    # The cache is shared; it is ours alone only if this start created the whole storage.
    cache = [run_dir.parent / CACHE] if run_dir.parent in created else []
    remove_empty((run_dir, *cache, *created[1:]))


def remove_ray_marker(run_dir: Path) -> None:
    """Remove the file with which Ray Train tests that the run directory is writable."""
    with suppress(OSError):
        (run_dir / _RAY_MARKER).unlink(missing_ok=True)


def record_job(run_dir: Path, job: JobSpec) -> None:
    """Write the resolved job, and prepare the directory for a new Ray Train controller."""
    write_text(run_dir / JOB, loader.dump(job))
    # Ray's list of checkpoints may name some that were removed; ours are found by their manifests.
    (run_dir / _RAY_SNAPSHOT).unlink(missing_ok=True)


def require_same_data(
    run_dir: Path,
    training: Path,
    evaluation: Mapping[str, Path],
    files: Mapping[str, object] | None = None,
) -> None:
    """Record the data at the first start of a run; require the same data at every later start.

    Args:
        run_dir: The run directory.
        training: The packed training dataset; its name is a hash of everything that determines its content.
        evaluation: The packed evaluation datasets by name.
        files: The source files, recorded but not compared.

    Raises:
        SpecError: The run was started with other data.
    """
    sets = {name: folder.name for name, folder in evaluation.items()}
    names = {"train": training.name, "eval": sets or None}
    extra = {"files": files} if files else None
    changed = [f"data.{split}" for split in _changed_fields(run_dir, DATA, names, extra)]
    if changed:
        raise changed_inputs_error(run_dir, changed)


def changed_inputs_error(run_dir: Path, changed: list[str]) -> SpecError:
    """Return the error for a run whose inputs changed since its first start."""
    return SpecError(
        f"{' and '.join(changed)} changed since run {run_dir} started (a data file, the tokenizer, the chat "
        "template or the model), so it cannot resume; restore the old files, change name in the job file, or "
        "remove the run directory"
    )


def require_same_base(run_dir: Path, identity: Mapping[str, object]) -> None:
    """Record the base model at the first start of a LoRA run; require the same at every later start.

    Args:
        run_dir: The run directory.
        identity: As `orchestrator.model.base_model_id.identity` returns it.

    Raises:
        SpecError: The run was started with another base model.
    """
    changed = _changed_fields(run_dir, BASE_MODEL_FILE, identity)
    if changed:
        raise SpecError(
            f"model.path is not the base model that run {run_dir} started with "
            f"({', '.join(changed)} differ), and its adapter only fits that one; restore that model, change "
            "name in the job file, or remove the run directory"
        )


def load_base_model_id(run_dir: Path) -> dict[str, object]:
    """Return the identity of the base model that a run's adapter belongs to.

    Raises:
        TrainingError: The run directory does not contain it.
    """
    try:
        identity: dict[str, object] = json.loads((run_dir / BASE_MODEL_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise TrainingError(
            f"{run_dir / BASE_MODEL_FILE}, which identifies the base model of the adapter, is missing; "
            "start the run again to write it"
        ) from None
    return identity


def _changed_fields(
    run_dir: Path, name: str, fields: Mapping[str, object], extra: Mapping[str, object] | None = None
) -> list[str]:
    """Compare fields with those recorded at the first start; record them if there was none.

    Args:
        run_dir: The run directory.
        name: Name of the file with the record.
        fields: What is compared.
        extra: Recorded with the fields but not compared.

    Returns:
        The names of the fields that differ.
    """
    file = run_dir / name
    if not (run_dir / ATTEMPTS).exists() or not file.exists():
        write_json(file, {**fields, **(extra or {})})
        return []
    recorded = json.loads(file.read_text(encoding="utf-8"))
    return [field for field in fields if fields[field] != recorded.get(field)]


def load_job(run_dir: Path) -> JobSpec:
    """Return the job of a run.

    Raises:
        SpecError: The directory is not a run directory.
    """
    if not (run_dir / JOB).is_file():
        raise SpecError(f"{run_dir} is not a run directory (it has no {JOB}); name STORAGE/NAME of a run")
    return loader.load(run_dir / JOB)
