"""Exports of a run: what the command `export` asks for, and what a run writes when it has finished."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config.schema import JobSpec
from orchestrator.data.tokenize import Note
from orchestrator.errors import OrchestratorError, SpecError, TrainingError
from orchestrator.export.destination import free_target, require_target
from orchestrator.export.export import MAX_SHARD_BYTES, Dtype, Exported, Request, export
from orchestrator.run.run_dir import load_base_model_id, load_job

_SECONDS_TO_CLEAN_UP = 10.0


def export_run(
    run_dir: Path,
    to: Path,
    merge: bool = False,
    step: int | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Export a checkpoint of a run to a folder.

    Args:
        run_dir: The run's folder.
        to: Folder to write; an earlier export is replaced, nothing else is.
        merge: Whether adapters are merged into the base model.
        step: Of the checkpoint; None takes the newest.
        dtype: Number format of the weights; None takes that of the run.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        SpecError: The folder must not be written, there is nothing to merge, or no checkpoint of that step.
        TrainingError: The run has no checkpoint, or the export cannot be written.
    """
    job = load_job(run_dir)
    if merge and job.method.type != "lora":
        raise SpecError(f"{run_dir} trained every parameter, so there is nothing to merge; leave out --merge")
    require_target(to, run_dir, job)
    saved = _checkpoint(run_dir, step)
    request = Request(
        job, run_dir, saved, dtype or _dtype_of(run_dir), _base(job, run_dir), merge, max_shard_bytes
    )
    return export(request, to)


def export_finished(run_dir: Path, job: JobSpec, dtype: Dtype, note: Note) -> Exported:
    """Export the newest checkpoint of a run that has finished, in a task of the cluster.

    It goes to STORAGE/NAME/export; where that holds what no export wrote, to the first free of export-2,
    export-3, ..., and `note` is told.

    Args:
        run_dir: The run's folder.
        job: The job as it ran.
        dtype: Number format of the weights.
        note: Told in a sentence where the export went instead.

    Raises:
        TrainingError: The export cannot be written.
    """
    to, problem = free_target(run_dir, job)
    if problem:
        note(f"exporting to {to}, because {problem}")
    request = Request(
        job, run_dir, checkpoint_dir.published(run_dir / "checkpoints")[-1], dtype, _base(job, run_dir)
    )
    reference = ray.remote(num_cpus=1)(export).remote(request, to)
    try:
        found: Exported = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise
    except BaseException:  # Ctrl-C: the task removes its draft before Ray ends its process
        ray.cancel(reference)
        with suppress(Exception):
            ray.get(reference, timeout=_SECONDS_TO_CLEAN_UP)
        raise
    return found


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    saved = checkpoint_dir.published(run_dir / "checkpoints")
    if not saved:
        raise TrainingError(f"{run_dir} has no published checkpoint; train the job first, then export")
    if step is None:
        return saved[-1]
    for each in saved:
        if checkpoint_dir.step_of(each) == step:
            return each
    there = ", ".join(str(checkpoint_dir.step_of(each)) for each in saved)
    raise SpecError(f"--step {step}: {run_dir} has no checkpoint of that step; there are {there}")


def _dtype_of(run_dir: Path) -> Dtype:
    """Return the number format that a run trained in."""
    try:
        rendered = json.loads((run_dir / "deepspeed.json").read_text(encoding="utf-8"))
        enabled = {name: bool(rendered[name]["enabled"]) for name in ("bf16", "fp16")}
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{run_dir / 'deepspeed.json'}, which records the dtype of the run, cannot be read; name the "
            "dtype with --dtype"
        ) from None
    return "bf16" if enabled["bf16"] else "fp16" if enabled["fp16"] else "fp32"


def _base(job: JobSpec, run_dir: Path) -> dict[str, Any] | None:
    return load_base_model_id(run_dir) if job.method.type == "lora" else None
