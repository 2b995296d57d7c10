"""What a run that is started again has still to do, if anything, and whether it is for the same job.

A finished run is held to the files that it was made from without Ray and without tokenising: their sizes and
times of change are in data.json, and a hash for where these differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypedDict

from orchestrator.atomic_files import JsonObject, read_lines, read_object
from orchestrator.checks.folders import JOB
from orchestrator.config.eval_sets import eval_sources
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.data.readers import locate
from orchestrator.data.sources import looks_like_hub_name
from orchestrator.engine.lr_schedule import schedule_change_message
from orchestrator.errors import SpecError
from orchestrator.model.base_model_id import WeightFile, weight_files
from orchestrator.run.recorder import ATTEMPTS, REPORT, STEPS
from orchestrator.run.run_dir import (
    DATA,
    changed_inputs_error,
    load_job,
    open_run,
    require_inputs,
    with_absolute_paths,
)

_logger = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
# Files of a model folder that determine the tokens and the model.
_MODEL_FILES = (
    "config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.tiktoken",
)  # fmt: skip


class InputFile(TypedDict):
    """A data file in data.json; `sha256` is None if it has not been computed."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str | None


def finished_before(job: JobSpec) -> JsonObject | None:
    """Return the report of a finished run, without importing any framework.

    Args:
        job: The job.

    Raises:
        OrchestratorError: The run directory belongs to another job, or an input is missing or has changed.
    """
    run_dir = Path(job.checkpoint.storage).expanduser() / job.name
    if not (run_dir / REPORT).is_file():
        return None
    job = with_absolute_paths(job)
    require_inputs(job)
    return finished_report(job, open_run(job))


def finished_report(job: JobSpec, run_dir: Path) -> JsonObject | None:
    """Return the report of a finished run, and log that nothing was trained.

    Args:
        job: The job, with absolute paths; it matches the run except for its number of steps.
        run_dir: The run directory.

    Returns:
        The report; None if there is none, or if the job sets another number of steps than the run had.

    Raises:
        SpecError: An input file has changed, or the run has done more steps than the job sets.
    """
    if not (run_dir / ATTEMPTS).is_file() or not (run_dir / JOB).is_file():
        return None
    if job.optim.max_steps is not None:
        require_no_fewer(job, run_dir, job.optim.max_steps, steps_done(run_dir))
    report = read_object(run_dir / REPORT)
    if report is None:
        return None
    before = load_job(run_dir).optim
    if (before.max_steps, before.epochs) != (job.optim.max_steps, job.optim.epochs):
        return None
    changed = _changed_inputs(run_dir, job)
    if changed:
        raise changed_inputs_error(run_dir, changed)
    _log_finished(run_dir, report)
    return report


def require_steps_to_go(job: JobSpec, run_dir: Path, packs: int) -> JsonObject | None:
    """Check the steps of a resumed run, and log how its learning rate schedule changes.

    Args:
        job: The job.
        run_dir: The run directory.
        packs: Packs of an epoch.

    Returns:
        The report if the run has done all steps of the job; None if there are steps to train.

    Raises:
        SpecError: The job sets fewer steps than the run has done.
    """
    attempts = read_lines(run_dir / ATTEMPTS)
    if not attempts or not (run_dir / JOB).is_file():
        return None
    optim, old = job.optim, load_job(run_dir).optim
    steps = optim.steps(packs)
    planned, done = int(attempts[-1]["steps_planned"]), steps_done(run_dir)
    require_no_fewer(job, run_dir, steps, done)
    report = read_object(run_dir / REPORT)
    if report is not None and steps == done:
        _log_finished(run_dir, report)
        return report
    if steps != planned:
        _logger.info(schedule_change_message(old, optim, done, planned, steps))
        unread = planned * old.global_batch_size - old.packs(packs) if done == planned else 0
        if unread:
            _logger.info(
                f"step {planned} was a partial batch, {unread} packs short; the first {unread} packs of the "
                "next epoch are skipped for it"
            )
    if report is not None:
        (run_dir / REPORT).rename(run_dir / f"report.step-{done:08d}.json")
    return None


def require_no_fewer(job: JobSpec, run_dir: Path, steps: int, done: int) -> None:
    """Refuse a job with fewer steps than the run has done."""
    if steps < done:
        field, value = (
            ("max_steps", job.optim.max_steps) if job.optim.max_steps else ("epochs", job.optim.epochs)
        )
        raise SpecError(
            f"optim.{field}={value} means {steps} steps, and run {run_dir} has already done {done}; set it "
            f"to at least {done} steps, or change name in the job file"
        )


def steps_done(run_dir: Path) -> int:
    """Return the last step in steps.jsonl or in a checkpoint."""
    saved = [
        int(path.parent.name.removeprefix("step-"))
        for path in (run_dir / _CHECKPOINTS).glob("step-*/manifest.json")
        if path.parent.name.removeprefix("step-").isdigit()
    ]
    rows = read_lines(run_dir / STEPS)
    return max([*saved, *(int(row["step"]) for row in rows)], default=0)


def input_files(job: JobSpec) -> dict[str, object]:
    """Return size, mtime and hash of each input file; None for hub datasets."""
    model = resolve(job.model.path)
    return {
        "data.train": [_described(source) for source in job.data.train],
        "eval.data": [_described(source) for source in _evaluation(job)] or None,
        "model": _model_files(model) if model.is_dir() else None,
    }


def _changed_inputs(run_dir: Path, job: JobSpec) -> list[str]:
    """Return the names of inputs that have changed since the run started."""
    try:
        files = json.loads((run_dir / DATA).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return []  # written by an earlier version
    changed = []
    groups = (("data.train", job.data.train), ("eval.data", _evaluation(job)))
    for field, sources in groups:
        for source, known in zip(sources, files.get(field) or (), strict=False):
            if known is not None and not _is_same(source, known):
                changed.append(f"{field} ({source.path})")
    model = resolve(job.model.path)
    if files.get("model") is not None and model.is_dir():
        now = _model_files(model)
        names = sorted(name for name in {*now, *files["model"]} if now.get(name) != files["model"].get(name))
        changed += [f"model.path ({', '.join(names)})"] if names else []
    return changed


def _evaluation(job: JobSpec) -> list[SourceSpec]:
    """Return the sources of eval.data by field, so that the order of evaluation sets does not matter."""
    return [source for _, source in sorted(eval_sources(job), key=itemgetter(0))]


def _described(source: SourceSpec) -> list[InputFile] | None:
    if looks_like_hub_name(source.path):
        return None
    found: list[InputFile] = []
    for file in locate(source):
        size, changed = file.stamp()
        found.append(
            {"name": file.name, "bytes": size, "mtime_ns": changed, "sha256": file.known_fingerprint()}
        )
    return found


def _is_same(source: SourceSpec, known: Sequence[InputFile]) -> bool:
    files = locate(source)
    if len(files) != len(known):
        return False
    for file, entry in zip(files, known, strict=True):
        if file.stamp() != (entry["bytes"], entry["mtime_ns"]) and file.fingerprint() != entry["sha256"]:
            return False
    return True


def _model_files(model: Path) -> dict[str, str | WeightFile]:
    """Return a hash of each small file of a model, and of the first and last bytes of each large one."""
    small = sorted({path for pattern in _MODEL_FILES for path in model.glob(pattern) if path.is_file()})
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small}
    return {**hashes, **weight_files(model)}


def _log_finished(run_dir: Path, report: JsonObject) -> None:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((run_dir / REPORT).stat().st_mtime))
    _logger.info(
        f"run {run_dir} already finished ({when}, {report['steps']} steps), so nothing was trained; this is "
        "its report"
    )
