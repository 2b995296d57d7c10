"""Preflight checks of cluster nodes.

`collect_node_info` runs on each node and reports GPUs, versions, /dev/shm and network. `diagnose`, a pure
function, compares the reports of all nodes and returns errors and warnings.
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
"""Packages that must have the same version on all nodes."""
SMALLEST_SHM_BYTES_PER_GPU = 2**30
"""NCCL's intra-node buffers and Ray's object store both use /dev/shm."""
LARGEST_SKEW_SECONDS = 1.0
"""Run locks and Prometheus compare timestamps from different nodes."""
_NVIDIA_SMI_SECONDS = 20.0
_NET = Path("/sys/class/net")


@dataclass(frozen=True)
class Gpu:
    """One GPU as reported by nvidia-smi.

    Attributes:
        name: Product name.
        memory_mib: Total memory in MiB.
        driver: Driver version.
    """

    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class NodeInfo:
    """Hardware, software and network of one node.

    Attributes:
        node: IP address by which other nodes reach it.
        hostname: Hostname of the node.
        gpus: GPUs listed by nvidia-smi.
        gpu_error: Why nvidia-smi failed; None if it succeeded or is not installed.
        shm_bytes: Size of /dev/shm; 0 if it does not exist.
        interface: Network interface with the address `node`; collectives use it.
        interface_megabits: Link speed in Mbit/s from sysfs; None if unknown.
        compiler: Whether a C++ compiler is installed; DeepSpeed compiles its ops with it.
        versions: Version of Python and of each package; None if a package is not installed.
        skew_seconds: Clock offset to the driver, positive if the node is ahead; None if not measured.
        skew_error_seconds: Upper bound of the error of `skew_seconds`.
        storage_problem: Why the node cannot use the storage; None if it can.
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
class Diagnostic:
    """One problem or warning about a cluster.

    Attributes:
        level: `problem` prevents training; `warning` may slow it down or surprise the user.
        sentence: Value, rule and remedy.
    """

    level: Literal["problem", "warning"]
    sentence: str


def collect_node_info(address: str) -> NodeInfo:
    """Collect hardware, software and network information of the current node.

    Args:
        address: IP address by which other nodes reach this one.
    """
    gpus, error = _gpus()
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    interface = _interface(address)
    return NodeInfo(
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


def write_marker(folder: Path, token: str, name: str) -> str | None:
    """Write a marker file into the storage for other nodes to look for.

    Args:
        folder: Storage to check, e.g. `checkpoint.storage`.
        token: Identifies this check; part of the file name.
        name: Name of this node.

    Returns:
        Why the file could not be written or read back; None on success.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _marker(folder, token, name)
        file.write_text(token, encoding="utf-8")
        if file.read_text(encoding="utf-8") != token:
            return "returned different bytes than were written"
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def missing_markers(folder: Path, token: str, names: Iterable[str]) -> list[str]:
    """Return the nodes whose marker files are not visible from this node.

    Args:
        folder: Storage to check.
        token: As for `write_marker`.
        names: Names of all nodes.
    """
    return [name for name in names if not _marker(folder, token, name).is_file()]


def remove_markers(folder: Path, token: str, names: Iterable[str]) -> None:
    """Remove the marker files of a check."""
    for name in names:
        with suppress(OSError):  # a file that could not be written cannot be removed either
            _marker(folder, token, name).unlink()


def _marker(folder: Path, token: str, name: str) -> Path:
    return folder / f".doctor-{token}-{name.replace(':', '_')}"


def now() -> float:
    """Return the Unix time of this node's clock in seconds."""
    return time.time()


def diagnose(nodes: Sequence[NodeInfo], expect_gpus: bool) -> list[Diagnostic]:
    """Return problems and warnings about the nodes, problems first.

    Args:
        nodes: Reports of all nodes.
        expect_gpus: Whether training runs on GPUs.
    """
    diagnostics = [*_check_versions(nodes), *_check_gpus(nodes, expect_gpus)]
    for node in nodes:
        diagnostics += _check_node(node, single_node=len(nodes) == 1)
    return sorted(diagnostics, key=lambda diagnostic: diagnostic.level != "problem")


def _check_versions(nodes: Sequence[NodeInfo]) -> Iterator[Diagnostic]:
    for name in dict.fromkeys(name for node in nodes for name in node.versions):
        versions = {node.node: node.versions.get(name) for node in nodes}
        if len(set(versions.values())) > 1:
            listed = ", ".join(f"{version or 'none'} on {node}" for node, version in versions.items())
            yield Diagnostic(
                "problem",
                f"{name} differs between nodes ({listed}); install one version everywhere, or use one image",
            )
        elif None in versions.values() and name != PACKAGES[-1]:  # `submit` uploads the package itself
            yield Diagnostic(
                "problem", f"{name} is installed on no node; install it on all nodes, or use one image"
            )


def _check_gpus(nodes: Sequence[NodeInfo], expect_gpus: bool) -> Iterator[Diagnostic]:
    gpu_nodes = [node for node in nodes if node.gpus]
    if expect_gpus and not gpu_nodes:
        yield Diagnostic(
            "problem", "nvidia-smi lists no GPU on any node; check the driver, or set device: cpu"
        )
    gpus = [gpu for node in gpu_nodes for gpu in node.gpus]
    for noun, values in (("models", {gpu.name for gpu in gpus}), ("drivers", {gpu.driver for gpu in gpus})):
        if len(values) > 1:
            listed = ", ".join(sorted(values))
            yield Diagnostic(
                "warning", f"GPU {noun} differ ({listed}); use nodes of the same type and one image"
            )
    counts = {node.node: len(node.gpus) for node in gpu_nodes}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on {node}" for node, count in counts.items())
        yield Diagnostic(
            "warning", f"nodes have different numbers of GPUs ({listed}); use nodes of the same type"
        )


def _check_node(node: NodeInfo, single_node: bool) -> Iterator[Diagnostic]:
    where = f"{node.node} ({node.hostname})"
    if node.gpu_error:
        yield Diagnostic("problem", f"{where}: nvidia-smi fails ({node.gpu_error}); check the driver")
    if node.storage_problem:
        yield Diagnostic(
            "problem",
            f"{where}: storage {node.storage_problem}; mount storage that every node can read and write",
        )
    if not node.compiler:
        yield Diagnostic(
            "problem",
            f"{where}: no C++ compiler found, and DeepSpeed compiles its ops at first use; install g++",
        )
    required = SMALLEST_SHM_BYTES_PER_GPU * max(1, len(node.gpus))
    if node.shm_bytes < required:
        level: Literal["problem", "warning"] = "problem" if len(node.gpus) > 1 else "warning"
        yield Diagnostic(
            level,
            f"{where}: /dev/shm has {node.shm_bytes / 2**20:.0f} MiB, and NCCL and Ray need "
            f"{required / 2**20:.0f} MiB; start the container with --shm-size, or mount an emptyDir with "
            "medium: Memory at /dev/shm",
        )
    if node.skew_seconds is not None:
        ahead = abs(node.skew_seconds) - node.skew_error_seconds
        if ahead > LARGEST_SKEW_SECONDS:
            yield Diagnostic(
                "warning",
                f"{where}: clock is {node.skew_seconds:+.1f} s from the driver's (limit "
                f"{LARGEST_SKEW_SECONDS:g} s); run NTP on all nodes",
            )
    if node.interface == "lo" and not single_node:
        yield Diagnostic(
            "warning",
            f"{where}: the address belongs to lo and other nodes cannot reach it; start Ray with "
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
        return (), f"no response: {type(error).__name__}"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return (), lines[0] if lines else f"exit code {done.returncode}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, int(float(memory)), driver) for name, memory, driver in rows), None


def _interface(address: str) -> str | None:
    """Return the network interface with an IP address."""
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
