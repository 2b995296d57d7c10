"""The run's folder: what lies in it, and whether a job may go on in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from orchestrator import jobfile
from orchestrator.data.files import missing
from orchestrator.errors import ClusterError, SpecError, TrainingError
from orchestrator.model.base import BASE
from orchestrator.paths import as_submitted, resolve
from orchestrator.spec import JobSpec, SourceSpec
from orchestrator.train.own_files import overwritten_by_a_run
from orchestrator.train.recorder import ATTEMPTS
from orchestrator.train.summary import REPORT

JOB = "job.yaml"
DATA = "data.json"  # which plans the run trains and evaluates on
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
# What may differ between the first start of a run and a later one: no trained number depends on it.
_FREE = (
    "run.max_failures",
    "run.env",
    "run.collective_timeout_seconds",
    "checkpoint",
    "metrics",
    "eval.every_steps",
    "model.gradient_checkpointing",
    "model.loss_tile_tokens",
    "model.mlp_tile_tokens",
    "parallel.offload_activations",
    "parallel.offload_path",
    "parallel.expandable_segments",
)


def with_absolute_paths(job: JobSpec) -> JobSpec:
    """Return the job with local paths made absolute, as seen from the driver's working directory."""

    def settle(sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        return tuple(source.model_copy(update={"path": _absolute(source.path)}) for source in sources)

    model = job.model.model_copy(update={"path": _absolute(job.model.path)})
    adapter = job.method.adapter and _absolute(job.method.adapter)
    method = job.method.model_copy(update={"adapter": adapter})
    data = job.data.model_copy(update={"train": settle(job.data.train)})
    held_out = job.eval.model_copy(update={"data": settle(job.eval.data)}) if job.eval else None
    storage = str(Path(job.checkpoint.storage).expanduser().absolute())
    saving = job.checkpoint.model_copy(update={"storage": storage})
    changed = {"model": model, "method": method, "data": data, "eval": held_out, "checkpoint": saving}
    return job.model_copy(update=changed)


def _absolute(path: str) -> str:
    """Return a path that holds in any working directory; hub names and what this package ships stay."""
    found = resolve(path)
    return path if path.startswith("builtin/") or not found.exists() else str(found.absolute())


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


def open_run(job: JobSpec) -> Path:
    """Return the run's folder, made where it is new.

    Raises:
        ClusterError: The storage cannot be written.
        SpecError: The folder holds a run of another job.
    """
    home = Path(job.checkpoint.storage) / job.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):  # has no name that could be another file's
            pass
        if name := overwritten_by_a_run(home):
            raise SpecError(
                f"{home} holds a {name} that no run wrote, and this run would overwrite it; move it away, or "
                "give this job another name"
            )
        if (home / ATTEMPTS).exists():
            _require_same(job_of(home), job, home)
    except OSError as error:
        raise ClusterError(
            f"checkpoint.storage={job.checkpoint.storage} cannot be written ({error.strerror}); name a "
            "folder that the driver and every node can write"
        ) from None
    return home


def record_job(home: Path, job: JobSpec) -> None:
    """Write the job as resolved, and make the folder ready for a new driver."""
    (home / JOB).write_text(jobfile.dump(job), encoding="utf-8")
    # Ray's list of checkpoints may name some that are gone; ours are found by their manifests.
    (home / _RAY_SNAPSHOT).unlink(missing_ok=True)


def require_same_data(home: Path, training: Path, evaluation: Path | None) -> None:
    """Record which data a run trains on at its first start, and hold every later start to it.

    Args:
        home: The run's folder.
        training: The plan of the training data; its name is a hash of all that decides it.
        evaluation: The plan of the held-out data.

    Raises:
        SpecError: The run has trained on other data.
    """
    found = {"train": training.name, "eval": evaluation.name if evaluation else None}
    changed = [f"data.{kind}" for kind in _changed(home, DATA, found)]
    if changed:
        raise SpecError(
            f"{' and '.join(changed)} of the run in {home} changed since it began (a data file, the "
            "tokenizer or its template is another), so it would not go on where it stood; bring the old ones "
            "back, give this job another name, or remove the folder"
        )


def require_same_base(home: Path, found: Mapping[str, Any]) -> None:
    """Record which model a run trains adapters beside at its first start, and hold every later start to it.

    Args:
        home: The run's folder.
        found: As `orchestrator.model.base.identity` tells it.

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


def _changed(home: Path, record: str, found: Mapping[str, Any]) -> list[str]:
    """Return what differs from what a run recorded when it began; record it where it has not begun."""
    file = home / record
    if not (home / ATTEMPTS).exists() or not file.exists():
        write_json(file, dict(found))
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    return [name for name in found if found[name] != before.get(name)]


def require_inputs(job: JobSpec) -> None:
    """Look for the files that a job names, before anything is started.

    Raises:
        SpecError: With every data file that is not there, and a model folder that is none.
    """
    problems = [
        problem
        for source in (*job.data.train, *(job.eval.data if job.eval else ()))
        if (problem := missing(source))
    ]
    model = resolve(job.model.path)
    if model.is_dir() and not (model / "config.json").is_file():
        problems.append(
            f"model.path={job.model.path} has no config.json; name a folder in Hugging Face format"
        )
    elif not model.is_dir() and job.model.path.startswith(("/", ".", "~", "builtin/")):
        problems.append(f"model.path={job.model.path} is not there; name an existing folder, or a hub model")
    if problems:
        raise SpecError(*problems)


def job_of(home: Path) -> JobSpec:
    """Return the job of a run.

    Raises:
        SpecError: The folder is none of a run.
    """
    if not (home / JOB).is_file():
        raise SpecError(f"{home} is not the folder of a run (it has no {JOB}); name STORAGE/NAME of a run")
    return jobfile.load(home / JOB)


def finished(home: Path) -> dict[str, Any] | None:
    """Return the report of a run that is complete, or None."""
    try:
        report: dict[str, Any] = json.loads((home / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _require_same(old: JobSpec, new: JobSpec, home: Path) -> None:
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    differing = [
        f"{key}={after.get(key)} (the run has {before.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    ]
    if differing:
        raise SpecError(
            f"{home} holds a run of another job: {', '.join(differing)}; give this job another name, or "
            "remove the folder"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        for index, child in enumerate(value):
            yield from _flat(child, f"{prefix}.{index}")
    else:
        yield prefix, as_submitted(value) if isinstance(value, str) else value
