"""What a node is found to be like before training starts on it, and what of that would go wrong.

`inspect` looks at the node that it runs on; `judge`, a pure function, compares what was found on all.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "orchestrator-llm-trainer")
"""Packages whose versions have to be the same on all nodes."""
SMALLEST_SHM_BYTES_PER_GPU = 2**30
"""NCCL's buffers between the GPUs of a node lie in /dev/shm, and so do Ray's objects."""
LARGEST_SKEW_SECONDS = 1.0
"""Leases of runs and Prometheus compare clocks of nodes."""
_NVIDIA_SMI_SECONDS = 20.0
_NET = Path("/sys/class/net")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it.

    Attributes:
        name: Name of the device.
        memory_mib: Its memory in MiB.
        driver: Version of the driver.
    """

    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class Found:
    """What was found on one node.

    Attributes:
        node: Address by which other nodes reach it.
        hostname: Its own name.
        gpus: Its GPUs.
        gpu_error: Why nvidia-smi does not answer; None where it does, or is not there.
        shm_bytes: Size of /dev/shm; 0 where there is none.
        interface: Network interface that has the address, on which collectives run.
        interface_megabits: Speed of that interface as the kernel states it; None where it states none.
        compiler: Whether a C++ compiler is there, with which DeepSpeed builds its operators.
        versions: Version of Python and of each package; None where one is not installed.
        skew_seconds: How far its clock is ahead of the driver's; None where that was not measured.
        skew_error_seconds: How far that may be off.
        storage_problem: Why it cannot use the storage; None where it can.
    """

    node: str
    hostname: str
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None
    shm_bytes: int = 0
    interface: str | None = None
    interface_megabits: int | None = None
    compiler: bool = False
    versions: Mapping[str, str | None] = field(default_factory=dict)
    skew_seconds: float | None = None
    skew_error_seconds: float = 0.0
    storage_problem: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: `problem` keeps training from working; `warning` may make it slow or surprise.
        sentence: Value, rule and remedy.
    """

    level: Literal["problem", "warning"]
    sentence: str


def inspect(address: str) -> Found:
    """Look at this node.

    Args:
        address: By which other nodes reach it.
    """
    gpus, error = _gpus()
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    interface = _interface(address)
    return Found(
        node=address,
        hostname=socket.gethostname(),
        gpus=gpus,
        gpu_error=error,
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else 0,
        interface=interface,
        interface_megabits=_megabits(interface),
        compiler=any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    )


def mark(folder: Path, token: str, name: str) -> str | None:
    """Write a file into the storage, to be looked for from other nodes; return why it cannot be.

    Args:
        folder: The storage.
        token: Of this examination.
        name: Of this node.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _mark(folder, token, name)
        file.write_text(token, encoding="utf-8")
        if file.read_text(encoding="utf-8") != token:
            return "reads back other bytes than were written"
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def missing_marks(folder: Path, token: str, names: Iterable[str]) -> list[str]:
    """Return the nodes whose files this node does not see in the storage.

    Args:
        folder: The storage.
        token: Of this examination.
        names: Of all nodes.
    """
    return [name for name in names if not _mark(folder, token, name).is_file()]


def unmark(folder: Path, token: str, names: Iterable[str]) -> None:
    """Remove the files of an examination."""
    for name in names:
        with suppress(OSError):  # where they could not be written they cannot be removed either
            _mark(folder, token, name).unlink()


def _mark(folder: Path, token: str, name: str) -> Path:
    return folder / f".doctor-{token}-{name.replace(':', '_')}"


def now() -> float:
    """Return this node's clock."""
    return time.time()


def judge(found: Sequence[Found], wants_gpus: bool) -> list[Finding]:
    """Return what would go wrong on the nodes, worst first.

    Args:
        found: What was found on each.
        wants_gpus: Whether training is to run on GPUs.
    """
    every = [*_of_versions(found), *_of_gpus(found, wants_gpus)]
    for one in found:
        every += _of_node(one, alone=len(found) == 1)
    return sorted(every, key=lambda finding: finding.level != "problem")


def _of_versions(found: Sequence[Found]) -> Iterator[Finding]:
    for name in dict.fromkeys(name for one in found for name in one.versions):
        versions = {one.node: one.versions.get(name) for one in found}
        if len(set(versions.values())) > 1:
            listed = ", ".join(f"{version or 'none'} on {node}" for node, version in versions.items())
            yield Finding(
                "problem",
                f"{name} differs between nodes ({listed}); install the same on all, or use one image",
            )
        elif None in versions.values() and name != PACKAGES[-1]:  # a job that is submitted brings that along
            yield Finding("problem", f"{name} is installed on no node; install it on all, or use one image")


def _of_gpus(found: Sequence[Found], wants_gpus: bool) -> Iterator[Finding]:
    with_gpus = [one for one in found if one.gpus]
    if wants_gpus and not with_gpus:
        yield Finding(
            "problem", "no node has a GPU that nvidia-smi shows; check the driver, or set device: cpu"
        )
    every = [gpu for one in with_gpus for gpu in one.gpus]
    for what, kinds in (("models", {gpu.name for gpu in every}), ("drivers", {gpu.driver for gpu in every})):
        if len(kinds) > 1:
            listed = ", ".join(sorted(kinds))
            yield Finding("warning", f"GPU {what} differ ({listed}); use nodes of one kind and one image")
    counts = {one.node: len(one.gpus) for one in with_gpus}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on {node}" for node, count in counts.items())
        yield Finding("warning", f"nodes have different numbers of GPUs ({listed}); use nodes of one kind")


def _of_node(one: Found, alone: bool) -> Iterator[Finding]:
    where = f"{one.node} ({one.hostname})"
    if one.gpu_error:
        yield Finding("problem", f"{where}: nvidia-smi fails ({one.gpu_error}); check the driver")
    if one.storage_problem:
        yield Finding(
            "problem",
            f"{where}: the storage {one.storage_problem}; mount storage that every node reads and writes",
        )
    if not one.compiler:
        yield Finding(
            "problem",
            f"{where}: there is no C++ compiler, and DeepSpeed builds operators at first use; install g++",
        )
    needed = SMALLEST_SHM_BYTES_PER_GPU * max(1, len(one.gpus))
    if one.shm_bytes < needed:
        level: Literal["problem", "warning"] = "problem" if len(one.gpus) > 1 else "warning"
        yield Finding(
            level,
            f"{where}: /dev/shm has {one.shm_bytes / 2**20:.0f} MiB, and NCCL and Ray want "
            f"{needed / 2**20:.0f} MiB; start the container with --shm-size, or mount an emptyDir of medium "
            "Memory there",
        )
    if one.skew_seconds is not None:
        ahead = abs(one.skew_seconds) - one.skew_error_seconds
        if ahead > LARGEST_SKEW_SECONDS:
            yield Finding(
                "warning",
                f"{where}: its clock is {one.skew_seconds:+.1f} s from the driver's, and "
                f"{LARGEST_SKEW_SECONDS:g} s are tolerated; run NTP on all nodes",
            )
    if one.interface == "lo" and not alone:
        yield Finding(
            "warning",
            f"{where}: its address belongs to lo, which no other node reaches; start Ray with "
            "--node-ip-address",
        )


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    if shutil.which("nvidia-smi") is None:
        return (), None
    fields = "name,memory.total,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"it does not answer: {type(error).__name__}"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return (), lines[0] if lines else f"code {done.returncode}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, int(float(memory)), driver) for name, memory, driver in rows), None


def _interface(address: str) -> str | None:
    """Return the interface that has an address."""
    try:
        done = subprocess.run(
            ["ip", "-o", "address"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) > 3 and words[3].split("/")[0] == address:
            return words[1].split("@")[0]
    return None


def _megabits(interface: str | None) -> int | None:
    try:
        speed = int((_NET / str(interface) / "speed").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
