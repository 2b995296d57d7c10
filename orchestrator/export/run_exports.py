"""Export a run: for the command `export`, and at the end of a run as a Ray task."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ray

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config.schema import JobSpec
from orchestrator.errors import OrchestratorError, SpecError, TrainingError
from orchestrator.export.destination import free_target, require_target
from orchestrator.export.export import MAX_SHARD_BYTES, Dtype, ExportRequest, ExportResult, export
from orchestrator.run.run_dir import load_base_model_id, load_job

_logger = logging.getLogger(__name__)

_CLEANUP_SECONDS = 10.0


def export_run(
    run_dir: Path,
    to: Path,
    merge: bool = False,
    step: int | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Export a checkpoint of a run to a directory.

    Args:
        run_dir: The run directory.
        to: Directory to write; an earlier export is replaced, anything else is not.
        merge: Whether to merge an adapter into the base model.
        step: Step of the checkpoint; None means the newest.
        dtype: Dtype of the weights; None means that of the run.
        max_shard_bytes: Maximum size of a file of weights.

    Raises:
        SpecError: The directory must not be written, there is no adapter to merge, or no checkpoint of
            that step.
        TrainingError: The run has no checkpoint, or the export cannot be written.
    """
    job = load_job(run_dir)
    if merge and job.method.type != "lora":
        raise SpecError(
            f"--merge requires a LoRA run, and {run_dir} was trained with method.type={job.method.type}; "
            "leave out --merge"
        )
    require_target(to, run_dir, job)
    checkpoint = _checkpoint(run_dir, step)
    base = _base_model_id(job, run_dir)
    request = ExportRequest(
        job, run_dir, checkpoint, dtype or _dtype_of(run_dir), base, merge, max_shard_bytes
    )
    return export(request, to)


def export_finished(run_dir: Path, job: JobSpec, dtype: Dtype) -> ExportResult:
    """Export the newest checkpoint of a finished run, as a Ray task.

    Writes to STORAGE/NAME/export, or if that contains files that are not part of an export, to the first
    usable of export-2, export-3, ...

    Args:
        run_dir: The run directory.
        job: The job of the run.
        dtype: Dtype of the weights.

    Raises:
        TrainingError: The export cannot be written.
    """
    to, problem = free_target(run_dir, job)
    if problem:
        _logger.info(f"exporting to {to}, because {problem}")
    checkpoint = checkpoint_dir.published(run_dir / "checkpoints")[-1]
    request = ExportRequest(job, run_dir, checkpoint, dtype, _base_model_id(job, run_dir))
    reference = ray.remote(num_cpus=1)(export).remote(request, to)
    try:
        result: ExportResult = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise
    except BaseException:  # Ctrl-C: give the task time to remove its draft before Ray kills it
        ray.cancel(reference)
        with suppress(Exception):
            ray.get(reference, timeout=_CLEANUP_SECONDS)
        raise
    return result


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    checkpoints = checkpoint_dir.published(run_dir / "checkpoints")
    if not checkpoints:
        raise TrainingError(f"{run_dir} has no published checkpoint; train the job first, then export")
    if step is None:
        return checkpoints[-1]
    by_step = {checkpoint_dir.step_of(checkpoint): checkpoint for checkpoint in checkpoints}
    if step not in by_step:
        steps = ", ".join(map(str, by_step))
        raise SpecError(f"--step {step}: {run_dir} has no checkpoint of that step; use one of {steps}")
    return by_step[step]


def _dtype_of(run_dir: Path) -> Dtype:
    """Return the dtype that a run trained in."""
    try:
        config = json.loads((run_dir / "deepspeed.json").read_text(encoding="utf-8"))
        enabled = {name: bool(config[name]["enabled"]) for name in ("bf16", "fp16")}
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{run_dir / 'deepspeed.json'}, which records the dtype of the run, cannot be read; name the "
            "dtype with --dtype"
        ) from None
    return "bf16" if enabled["bf16"] else "fp16" if enabled["fp16"] else "fp32"


def _base_model_id(job: JobSpec, run_dir: Path) -> Mapping[str, object] | None:
    return load_base_model_id(run_dir) if job.method.type == "lora" else None
