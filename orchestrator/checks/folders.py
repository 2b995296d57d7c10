"""What a job writes: whether its folders can be made and written, and whether a run of another job is there.

Nothing is made or written here, so that a job can be looked at without leaving a trace.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checks.owned_files import overwritten_by_a_run
from orchestrator.config import loader
from orchestrator.config.paths import as_submitted, resolve
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import Problem
from orchestrator.errors import SpecError

JOB = "job.yaml"
ATTEMPTS = "attempts.jsonl"
# What may differ between the first start of a run and a later one: no trained number depends on it.
_FREE = (
    "optim.max_steps",  # these two as long as they ask for no fewer steps than are done
    "optim.epochs",
    "run.max_failures",
    "run.stop_grace_seconds",
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
# File systems of the kernel's own, which take no files though they may look writable.
_NO_FILES = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "securityfs", "debugfs", "tracefs"})
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


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


def folder_problems(job: JobSpec, workers_here: bool = True) -> Iterator[Problem]:
    """Yield the folders that a job is to write and this machine cannot.

    Args:
        job: The job.
        workers_here: Whether workers run on this machine, so that their disk is this one's.

    Yields:
        The field concerned, and one sentence with value, rule and remedy.
    """
    storage = job.checkpoint.storage
    if reason := unwritable(run_folder(job)):
        yield (
            ("checkpoint.storage",),
            f"checkpoint.storage={storage} cannot be written ({reason}); name a folder that the driver and "
            "every node can write",
        )
    path = job.parallel.offload_path
    on_disk = "nvme" in (job.parallel.offload_optimizer, job.parallel.offload_param)
    if not (workers_here and on_disk and path):
        return
    folder = Path(path).absolute()
    if reason := unwritable(folder):
        yield (
            ("parallel.offload_path",),
            f"parallel.offload_path={path} cannot be written ({reason}); name a folder that every worker can "
            "write",
        )
    elif folder.exists() and (kind := _file_system_of(folder)) in _IN_MEMORY:
        yield (
            ("parallel.offload_path",),
            f"parallel.offload_path={path} lies on {kind}, which is memory and no disk; name a folder on a "
            "disk, or offload to cpu",
        )


def run_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield what keeps a job from training in its run's folder: another job's run, or files of the user's."""
    run_dir = run_folder(job)
    try:
        if not (run_dir / ATTEMPTS).exists():
            if name := overwritten_by_a_run(run_dir):
                yield (
                    ("name",),
                    f"{run_dir} holds a {name} that no run wrote, and this run would overwrite it; move it "
                    "away, or give this job another name",
                )
            return
        old = loader.load(run_dir / JOB)
    except SpecError as error:
        for sentence in error.problems:
            yield ("name",), f"{run_dir} holds a run whose {JOB} cannot be used: {sentence}"
        return
    except OSError:  # the folder's own problem, which `folder_problems` tells
        return
    differing = differences(old, with_absolute_paths(job))
    if differing:
        yield (
            ("name", *differing),
            f"{run_dir} holds a run of another job: {', '.join(differing.values())}; give this job another "
            "name, or remove the folder",
        )


def differences(old: JobSpec, new: JobSpec) -> dict[str, str]:
    """Return by field how two jobs differ in what decides a trained number, as a text for each.

    Args:
        old: The job of a run, with absolute paths.
        new: The job that is to go on with it, with absolute paths.
    """
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    return {
        key: f"{key}={after.get(key)} (the run has {before.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    }


def unwritable(folder: Path) -> str | None:
    """Return why a folder cannot be made or written, as far as can be told without doing it; None if it can.

    Args:
        folder: An absolute path.
    """
    for place in (folder, *folder.parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"{place} is a link to nothing"
            continue
        except OSError as error:
            return error.strerror
        if not stat.S_ISDIR(mode):
            return f"{place} is a file"
        kind = _file_system_of(place)
        if kind in _NO_FILES:
            return f"{place} lies on {kind}, which takes no files"
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            return f"{place} is on a read-only file system"
        return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write {place}"
    return None


def _file_system_of(place: Path) -> str | None:
    """Return the type of the file system that a folder is on, or None where the kernel does not say."""
    device = place.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return None


def run_folder(job: JobSpec) -> Path:
    """Return the folder of a job's run, STORAGE/NAME; it may not exist."""
    return Path(job.checkpoint.storage).expanduser().absolute() / job.name


def _absolute(path: str) -> str:
    """Return a path that holds in any working directory; hub names and what this package ships stay."""
    found = resolve(path)
    return path if path.startswith("builtin/") or not found.exists() else str(found.absolute())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        for index, child in enumerate(value):
            yield from _flat(child, f"{prefix}.{index}")
    else:
        yield prefix, as_submitted(value) if isinstance(value, str) else value
