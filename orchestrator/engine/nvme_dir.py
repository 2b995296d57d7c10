"""A worker's directory on a local disk for offloaded state; removed when the worker ends."""

from __future__ import annotations

import copy
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import distributed as dist

from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig

_SWAP_DIR = re.compile(r".+\.rank-\d+\.[0-9a-f]{8}\.swap")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_MOUNTINFO = Path("/proc/self/mountinfo")
_GIB = 2**30


@dataclass(frozen=True)
class _Disk:
    """The file system of a worker's directory; `problem` says why it cannot be used."""

    node: str
    device: int = 0
    free_bytes: int = 0
    problem: str | None = None


@contextmanager
def open_nvme_dir(job: JobSpec, ds_config: DeepSpeedConfig, needed_bytes: int) -> Iterator[DeepSpeedConfig]:
    """Create a directory of this worker for NVMe offload, and remove it afterwards.

    Also removes directories of killed workers: a worker holds a lock on its directory while it lives, so an
    unlocked directory is a leftover. Every attempt gets new directories and never reads those of an earlier
    one. Collective: every rank enters, and an error on one rank is raised on all.

    Args:
        job: The job.
        ds_config: The rendered DeepSpeed configuration.
        needed_bytes: What one worker will write.

    Yields:
        The configuration with `nvme_path` set.

    Raises:
        ClusterError: The directory cannot be created, is in memory, or has too little space.
    """
    parallel, config = job.parallel, copy.deepcopy(dict(ds_config))
    if "nvme" not in (parallel.offload_optimizer, parallel.offload_param):
        yield config
        return
    with ExitStack() as stack:
        directory, disk = None, _Disk(os.uname().nodename)
        try:
            parent = Path(str(parallel.offload_path))
            directory = stack.enter_context(_swap_dir(parent, f"{job.name}.rank-{dist.get_rank()}"))
            disk = _disk_of(parent, directory)
        except OSError as error:
            reason = f"cannot be used ({error.strerror}); name a directory that every worker can write"
            disk = _Disk(disk.node, problem=_message(parallel.offload_path, disk.node, reason))
        disks = [disk] * dist.get_world_size()
        dist.all_gather_object(disks, disk)
        if problems := _problems(disks, str(parallel.offload_path), needed_bytes):
            raise ClusterError(*problems)
        for name in ("offload_optimizer", "offload_param"):
            section = config["zero_optimization"].get(name, {})
            if section.get("device") == "nvme":
                section["nvme_path"] = str(directory)
        yield config


@contextmanager
def _swap_dir(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a directory, locked by this process, and remove it afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    # The lock on the parent keeps other workers from removing the directory before it is locked itself.
    with _locked(parent, wait=True):
        _remove_leftovers(parent)
        directory = parent / f"{prefix}.{uuid.uuid4().hex[:8]}.swap"
        directory.mkdir()
        lock = ExitStack()
        lock.enter_context(_locked(directory, wait=False))
    with lock:
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(directory: Path, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on a directory; the kernel releases it if the process dies.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is False.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    for path in parent.iterdir():
        if _SWAP_DIR.fullmatch(path.name) and path.is_dir():
            with suppress(OSError), _locked(path, wait=False):  # BlockingIOError: its worker is alive
                shutil.rmtree(path, ignore_errors=True)


def _disk_of(parent: Path, directory: Path) -> _Disk:
    node, usage, device = os.uname().nodename, os.statvfs(directory), os.stat(directory).st_dev
    file_system = _file_system_of(device)
    reason = f"is on {file_system}, which is memory; name a directory on a disk, or offload to cpu"
    return _Disk(
        node,
        device,
        usage.f_bavail * usage.f_frsize,
        _message(parent, node, reason) if file_system in _MEMORY_FILE_SYSTEMS else None,
    )


def _file_system_of(device: int) -> str | None:
    """Return the type of a mounted file system; None if /proc lists it under another device."""
    device_number = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTINFO.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == device_number:
            return fields[fields.index("-") + 1]
    return None


def _problems(disks: Sequence[_Disk], path: str, needed_bytes: int) -> list[str]:
    """Return an error message for each disk that cannot be used."""
    messages = dict.fromkeys(disk.problem for disk in disks if disk.problem)
    # Workers of a node may have the same file system, and then share its free space.
    by_device: dict[tuple[str, int], list[_Disk]] = {}
    for disk in disks:
        if not disk.problem:
            by_device.setdefault((disk.node, disk.device), []).append(disk)
    for (node, _), workers in by_device.items():
        free, needed = min(disk.free_bytes for disk in workers), len(workers) * needed_bytes
        if free < needed:
            reason = (
                f"has {free / _GIB:.4g} GiB free, and its {len(workers)} workers need "
                f"{needed / _GIB:.4g} GiB; free some space, name a directory on a larger disk, or use more "
                "parallel.workers"
            )
            messages[_message(path, node, reason)] = None
    return list(messages)


def _message(path: object, node: str, reason: str) -> str:
    return f"parallel.offload_path={path} on {node} {reason}"
