"""The run's folder: what lies in it, and whether a job may go on in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from orchestrator.atomic_files import read_object, write_json, write_whole
from orchestrator.checks.folders import ATTEMPTS, JOB, folder_problems, run_problems
from orchestrator.checks.folders import with_absolute_paths as with_absolute_paths
from orchestrator.checks.inputs import require_inputs as require_inputs
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError, TrainingError
from orchestrator.model.base_model_id import BASE

DATA = "data.json"  # which plans the run trains and evaluates on
CACHE = ".cache"  # of tokens and packs, beside the runs of a storage
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_RAY_MARKER = ".validate_storage_marker"  # written by Ray Train to try the storage, and left there
# What a start writes before its first attempt, in the order in which it can be removed.
_BEFORE_ATTEMPTS = (
    JOB, DATA, BASE, "plan.json", "deepspeed.json", "owner.json", "logs/driver.log", "logs", "checkpoints",
)  # fmt: skip


def number_format(job: JobSpec, device: Literal["cuda", "cpu"]) -> Literal["bf16", "fp16", "fp32"]:
    """Return the number format that a job runs in: bf16 on CUDA and fp32 on CPU unless it says otherwise.

    Raises:
        SpecError: fp16 is asked for on CPU, where DeepSpeed does not offer it.
    """
    if job.model.dtype == "fp16" and device == "cpu":
        raise SpecError(
            "model.dtype=fp16 needs CUDA, and this job runs on CPU; use dtype: fp32, or dtype: bf16 for a try"
        )
    if job.model.dtype == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return job.model.dtype


def open_run(job: JobSpec, workers_here: bool = True) -> Path:
    """Return the run's folder, made where it is new and nothing speaks against the job.

    Args:
        job: The job, with absolute paths.
        workers_here: Whether workers run on this machine.

    Raises:
        ClusterError: The storage cannot be written.
        SpecError: The folder holds a run of another job.
    """
    home = Path(job.checkpoint.storage) / job.name
    refused = [sentence for _, sentence in run_problems(job)]
    in_the_way = [sentence for _, sentence in folder_problems(job, workers_here)]
    if refused:
        raise SpecError(*refused, *in_the_way)
    if in_the_way:
        raise ClusterError(*in_the_way)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):  # has no name that could be another file's
            pass
    except OSError as error:
        raise ClusterError(
            f"checkpoint.storage={job.checkpoint.storage} cannot be written ({error.strerror}); name a "
            "folder that the driver and every node can write"
        ) from None
    return home


def absent_folders(folder: Path) -> list[Path]:
    """Return a folder and those above it, as far as making it will make them, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing, in their order; others stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def withdraw(home: Path, made: Sequence[Path]) -> None:
    """Leave nothing of a run that was refused before its first attempt, so that no empty folder stays.

    A plan that says why a job does not fit stays, and so does whatever this program did not write.

    Args:
        home: The run's folder.
        made: The folders that this start has made, the run's own first.
    """
    plan = read_object(home / "plan.json") or {}
    if home not in made or (home / ATTEMPTS).exists() or plan.get("verdict") == "does not fit":
        return
    for name in _BEFORE_ATTEMPTS:
        with suppress(OSError):
            (home / name).rmdir() if (home / name).is_dir() else (home / name).unlink()
    own = home.parent in made  # then nobody else keeps tokens there
    # What stays holds something: another run, the cache of tokens, a file of the user.
    remove_empty((home, *([home.parent / CACHE] if own else []), *made[1:]))


def remove_marker(home: Path) -> None:
    """Remove what Ray Train leaves in a run's folder from trying whether it can write there."""
    with suppress(OSError):
        (home / _RAY_MARKER).unlink(missing_ok=True)


def record_job(home: Path, job: JobSpec) -> None:
    """Write the job as resolved, and make the folder ready for a new driver."""
    write_whole(home / JOB, loader.dump(job))
    # Ray's list of checkpoints may name some that are gone; ours are found by their manifests.
    (home / _RAY_SNAPSHOT).unlink(missing_ok=True)


def require_same_data(
    home: Path, training: Path, evaluation: Path | None, files: Mapping[str, Any] | None = None
) -> None:
    """Record which data a run trains on at its first start, and hold every later start to it.

    Args:
        home: The run's folder.
        training: The plan of the training data; its name is a hash of all that decides it.
        evaluation: The plan of the held-out data.
        files: The files that they were made from, to be recorded with them.

    Raises:
        SpecError: The run has trained on other data.
    """
    found = {"train": training.name, "eval": evaluation.name if evaluation else None}
    changed = [f"data.{kind}" for kind in _changed(home, DATA, found, {"files": files} if files else {})]
    if changed:
        raise changed_since(home, changed)


def changed_since(home: Path, changed: list[str]) -> SpecError:
    """Return the error for a run whose inputs are not those that it began with."""
    return SpecError(
        f"{' and '.join(changed)} of the run in {home} changed since it began (a data file, the tokenizer or "
        "its template, or the model is another), so this is another job; bring the old ones back, give this "
        "job another name, or remove the folder"
    )


def require_same_base(home: Path, found: Mapping[str, Any]) -> None:
    """Record which model a run trains adapters beside at its first start, and hold every later start to it.

    Args:
        home: The run's folder.
        found: As `orchestrator.model.base_model_id.identity` tells it.

    Raises:
        SpecError: The run has trained beside another model.
    """
    changed = _changed(home, BASE, found)
    if changed:
        raise SpecError(
            f"model.path of the run in {home} names another model than when it began ({', '.join(changed)} "
            "differ), and its adapters are for that one; bring it back, give this job another name, or "
            "remove the folder"
        )


def base_of(home: Path) -> dict[str, Any]:
    """Return which model a run trained adapters beside.

    Raises:
        TrainingError: The run's folder does not say it.
    """
    try:
        found: dict[str, Any] = json.loads((home / BASE).read_text(encoding="utf-8"))
    except OSError:
        raise TrainingError(
            f"{home} has no {BASE}, which says what its adapters belong to; start the run again, which "
            "writes it"
        ) from None
    return found


def _changed(
    home: Path, record: str, found: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> list[str]:
    """Return what differs from what a run recorded when it began; record it where it has not begun.

    Args:
        home: The run's folder.
        record: Name of the file.
        found: What is compared.
        more: What is recorded with it, and not compared.
    """
    file = home / record
    if not (home / ATTEMPTS).exists() or not file.exists():
        write_json(file, {**found, **(more or {})})
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    return [name for name in found if found[name] != before.get(name)]


def job_of(home: Path) -> JobSpec:
    """Return the job of a run.

    Raises:
        SpecError: The folder is none of a run.
    """
    if not (home / JOB).is_file():
        raise SpecError(f"{home} is not the folder of a run (it has no {JOB}); name STORAGE/NAME of a run")
    return loader.load(home / JOB)
