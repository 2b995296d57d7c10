"""A worker's own folder on a disk of its node, for what is offloaded there; removed at the end."""

from __future__ import annotations

import copy
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError

_OURS = re.compile(r".+\.rank-\d+\.[0-9a-f]{8}\.swap")
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")
_GIB = 2**30


@dataclass(frozen=True)
class _Place:
    """Where one worker would swap to; `problem` says why it cannot."""

    node: str
    file_system: int = 0
    free_bytes: int = 0
    problem: str | None = None


@contextmanager
def swap_folder(job: JobSpec, ds_config: Mapping[str, Any], needed_bytes: int) -> Iterator[dict[str, Any]]:
    """Give this worker a folder of its own for what goes to nvme, and remove it afterwards.

    What workers left that were killed is removed as well: a worker locks its folder for as long as it lives,
    and a folder that nobody has locked is nobody's. Two attempts at one run never share a folder, so what an
    earlier one wrote is never read. Collective: every rank enters, and what fails on one fails on all.

    Args:
        job: The job.
        ds_config: The rendered DeepSpeed configuration.
        needed_bytes: What a worker will write.

    Yields:
        The configuration with the folder.

    Raises:
        ClusterError: The folder cannot be made, would lie in memory, or has no room.
    """
    parallel, config = job.parallel, copy.deepcopy(dict(ds_config))
    if "nvme" not in (parallel.offload_optimizer, parallel.offload_param):
        yield config
        return
    with ExitStack() as stack:
        folder, place = None, _Place(os.uname().nodename)
        try:
            parent = Path(str(parallel.offload_path))
            folder = stack.enter_context(_own(parent, f"{job.name}.rank-{dist.get_rank()}"))
            place = _look_at(parent, folder)
        except OSError as error:
            reason = f"cannot be used ({error.strerror}); name a folder that every worker can write"
            place = _Place(place.node, problem=_sentence(parallel.offload_path, place.node, reason))
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, place)
        if problems := _problems(places, str(parallel.offload_path), needed_bytes):
            raise ClusterError(*problems)
        for name in ("offload_optimizer", "offload_param"):
            section = config["zero_optimization"].get(name, {})
            if section.get("device") == "nvme":
                section["nvme_path"] = str(folder)
        yield config


@contextmanager
def _own(parent: Path, prefix: str) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent, wait=True):
        _remove_leftovers(parent)
        folder = parent / f"{prefix}.{uuid.uuid4().hex[:8]}.swap"
        folder.mkdir()
        lock = ExitStack()
        lock.enter_context(_locked(folder, wait=False))
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold a lock on a folder, which ends with the process at the latest.

    Raises:
        BlockingIOError: Another process holds it, and we do not wait.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    for found in parent.iterdir():
        if _OURS.fullmatch(found.name) and found.is_dir():
            with suppress(OSError), _locked(found, wait=False):  # BlockingIOError: its worker lives
                shutil.rmtree(found, ignore_errors=True)


def _look_at(parent: Path, folder: Path) -> _Place:
    node, room, device = os.uname().nodename, os.statvfs(folder), os.stat(folder).st_dev
    kind = _file_system_of(device)
    reason = f"lies on {kind}, which is memory and no disk; name a folder on a disk, or offload to cpu"
    return _Place(
        node,
        device,
        room.f_bavail * room.f_frsize,
        _sentence(parent, node, reason) if kind in _IN_MEMORY else None,
    )


def _file_system_of(device: int) -> str | None:
    """Return the type of a mounted file system, or None where the kernel lists it under another number."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return None


def _problems(places: list[_Place], path: str, needed_bytes: int) -> list[str]:
    """Return a sentence for each node whose disk will not do."""
    found = dict.fromkeys(place.problem for place in places if place.problem)
    sharing: dict[tuple[str, int], list[_Place]] = {}
    for place in places:
        if not place.problem:
            sharing.setdefault((place.node, place.file_system), []).append(place)
    for (node, _), workers in sharing.items():
        free, needed = min(place.free_bytes for place in workers), len(workers) * needed_bytes
        if free < needed:
            reason = (
                f"has {free / _GIB:.4g} GiB free, and its {len(workers)} workers write "
                f"{needed / _GIB:.4g} GiB; make room, name a folder on another disk, or use more "
                "parallel.workers"
            )
            found[_sentence(path, node, reason)] = None
    return [sentence for sentence in found if sentence]


def _sentence(path: object, node: str, reason: str) -> str:
    return f"parallel.offload_path={path} on {node} {reason}"
