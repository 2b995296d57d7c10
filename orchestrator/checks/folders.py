"""Checks of the folders that a job writes: permissions, and runs of other jobs in the run directory.

Nothing is created or written, so that `validate` has no side effects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.checks.owned_files import overwritten_by_a_run
from orchestrator.config import loader
from orchestrator.config.eval_sets import with_sources
from orchestrator.config.paths import as_submitted, resolve
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import Problem
from orchestrator.data.file_patterns import has_wildcards
from orchestrator.data.model_tokenizer import with_chat_template
from orchestrator.errors import SpecError

JOB = "job.yaml"
ATTEMPTS = "attempts.jsonl"
# Fields that may change between attempts of a run: no trained weight depends on them, beyond rounding.
_FREE = (
    "optim.max_steps",  # train/resume.py rejects fewer steps than are done
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
    "optim.micro_batch_size",
    "parallel",  # a checkpoint is of the model, and the packs of a step are the same for any workers
)
# Virtual file systems of the kernel, which hold no files of users although their modes allow writing.
_NO_FILES = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "securityfs", "debugfs", "tracefs"})
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


def with_absolute_paths(job: JobSpec) -> JobSpec:
    """Return the job with absolute local paths, and what its chat template needs (`with_chat_template`)."""
    job = with_chat_template(job)

    def absolute(source: SourceSpec) -> SourceSpec:
        return source.model_copy(update={"path": _absolute(source.path)})

    model = job.model.model_copy(update={"path": _absolute(job.model.path)})
    adapter = job.method.adapter and _absolute(job.method.adapter)
    method = job.method.model_copy(update={"adapter": adapter})
    train = tuple(map(absolute, job.data.train))
    data = job.data.model_copy(update={"train": train})
    evaluation = with_sources(job.eval, absolute) if job.eval else None
    storage = str(Path(job.checkpoint.storage).expanduser().absolute())
    checkpoint = job.checkpoint.model_copy(update={"storage": storage})
    sections = {"model": model, "method": method, "data": data, "eval": evaluation, "checkpoint": checkpoint}
    return job.model_copy(update=sections)


def folder_problems(job: JobSpec, workers_here: bool = True) -> Iterator[Problem]:
    """Yield a problem for each folder of the job that cannot be written from this machine.

    Args:
        job: The job.
        workers_here: Whether workers run on this machine, so that parallel.offload_path is checked too.

    Yields:
        The field, and a message with value, rule and remedy.
    """
    storage = job.checkpoint.storage
    if reason := unwritable_reason(run_dir_of(job)):
        yield (
            ("checkpoint.storage",),
            f"checkpoint.storage={storage} cannot be written ({reason}); name a folder that the driver and "
            "every node can write",
        )
    path = job.parallel.offload_path
    uses_nvme = "nvme" in (job.parallel.offload_optimizer, job.parallel.offload_param)
    if not (workers_here and uses_nvme and path):
        return
    folder = Path(path).absolute()
    if reason := unwritable_reason(folder):
        yield (
            ("parallel.offload_path",),
            f"parallel.offload_path={path} cannot be written ({reason}); name a folder that every worker can "
            "write",
        )
    elif folder.exists() and (file_system := _file_system_of(folder)) in _IN_MEMORY:
        yield (
            ("parallel.offload_path",),
            f"parallel.offload_path={path} is on {file_system}, which is in memory; use a folder on a disk, "
            "or offload to cpu",
        )


def run_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield conflicts with the content of the run directory: a run of another job, or files of the user."""
    run_dir = run_dir_of(job)
    try:
        if not (run_dir / ATTEMPTS).exists():
            if name := overwritten_by_a_run(run_dir):
                yield (
                    ("name",),
                    f"{run_dir} contains a {name} that no run wrote, and this run would overwrite it; move "
                    "it away, or give this job another name",
                )
            return
        old = loader.load(run_dir / JOB)
    except SpecError as error:
        for message in error.problems:
            yield ("name",), f"{run_dir} contains a run with an invalid {JOB}: {message}"
        return
    except OSError:  # reported by `folder_problems`
        return
    differing = differences(old, with_absolute_paths(job))
    if differing:
        yield (
            ("name", *differing),
            f"{run_dir} contains a run of another job: {', '.join(differing.values())}; give this job "
            "another name, or remove the folder",
        )


def differences(old: JobSpec, new: JobSpec) -> dict[str, str]:
    """Return a description of each differing field on which trained weights depend.

    Args:
        old: The job of an existing run, with absolute paths.
        new: The job that would resume it, with absolute paths.
    """
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    bound = _bound_to_partitions(old)
    return {
        key: f"{key}={after.get(key)} (the run has {before.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and (key in bound or not key.startswith(_FREE))
    }


def _bound_to_partitions(job: JobSpec) -> frozenset[str]:
    """Return the fields on which 8-bit optimizer state depends: it is in blocks of a worker's partition."""
    if not job.optim.optimizer.endswith("8bit"):
        return frozenset()
    return frozenset({"parallel.zero_stage", *(["parallel.workers"] if job.parallel.zero_stage else [])})


def unwritable_reason(folder: Path) -> str | None:
    """Return why a folder cannot be created or written, without trying; None if it can.

    Args:
        folder: An absolute path; the first of its parents that exists decides.
    """
    for path in (folder, *folder.parents):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                return f"{path} is a broken symbolic link"
            continue
        except OSError as error:
            return error.strerror
        if not stat.S_ISDIR(mode):
            return f"{path} is a file"
        file_system = _file_system_of(path)
        if file_system in _NO_FILES:
            return f"{path} is on {file_system}, which cannot store files"
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return f"{path} is on a read-only file system"
        return None if os.access(path, os.W_OK | os.X_OK) else f"no permission to write {path}"
    return None


def _file_system_of(folder: Path) -> str | None:
    """Return the file system type of a folder, such as ext4; None if /proc does not list it."""
    status = folder.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields[2] == device:
            return fields[fields.index("-") + 1]
    return None


def run_dir_of(job: JobSpec) -> Path:
    """Return the run directory of a job, STORAGE/NAME; it may not exist."""
    return Path(job.checkpoint.storage).expanduser().absolute() / job.name


def _absolute(path: str) -> str:
    """Return an existing path as an absolute one; hub names, URIs and builtin/ names are unchanged."""
    resolved = resolve(path)
    is_local = resolved.exists() or (has_wildcards(path) and "://" not in path)
    return str(resolved.absolute()) if is_local and not path.startswith("builtin/") else path


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and value of each leaf; lists without mappings are leaves."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        for index, child in enumerate(value):
            yield from _flat(child, f"{prefix}.{index}")
    else:
        yield prefix, as_submitted(value) if isinstance(value, str) else value
