"""Number and resources of the worker pods of a job on Kubernetes, computed from the job file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from orchestrator.arch.hf_config import local_config, resized
from orchestrator.arch.parameters import parameter_count
from orchestrator.config.auto_values import resolve_dtype
from orchestrator.config.eval_sets import all_sources
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.parallel.deepspeed_config import render, size_nvme_buffers
from orchestrator.planner.estimate import workload_from_job
from orchestrator.planner.host_memory import disk_bytes
from orchestrator.planner.memory import host_memory_of_workload
from orchestrator.planner.workload import Model

GPUS_PER_NODE = 8
RAY_PORTS = {
    "gcs-server": 6379,
    "dashboard": 8265,
    "metrics": 8080,
    "as-metrics": 44217,
    "dash-metrics": 44227,
}
"""Ports of the head pod by the names that KubeRay and its monitors use."""
_AGENT_PORT = 52365  # Ray's dashboard agent, used by KubeRay's probes

GIB = 2**30
# Defaults, not measured; --memory-per-node and --cpus-per-node override them.
_WORKER_BYTES = {"cuda": 16 * GIB, "cpu": 4 * GIB}
_OBJECT_STORE_BYTES = {"cuda": 8 * GIB, "cpu": 1 * GIB}
_COLLECTIVES_BYTES = {"cuda": 8 * GIB, "cpu": 1 * GIB}  # shared-memory buffers of NCCL or gloo
_SPARE_CPUS = 1  # for Ray's processes and tokenization

_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DATA_ENDINGS = frozenset({".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow"})


@dataclass(frozen=True)
class PodOptions:
    """Command-line options for the pods of a RayJob.

    Attributes:
        image: Image of all pods; None uses the image of this version for the device.
        gpus_per_node: GPUs per node; each runs one worker.
        nodes: Number of worker pods; CPU jobs only.
        cpus_per_node: CPUs per worker pod.
        memory_per_node: Memory per worker pod in GiB.
        claim: Name of a PersistentVolumeClaim that all pods can write.
        mount: Mount path of that volume.
        namespace: Namespace of the objects; None leaves it to `kubectl -n`.
        deadline_hours: Hours after which KubeRay terminates an attempt.
    """

    image: str | None = None
    gpus_per_node: int | None = None
    nodes: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: int | None = None
    claim: str = "orchestrator-shared"
    mount: str = "/mnt/shared"
    namespace: str | None = None
    deadline_hours: int = 168


@dataclass(frozen=True)
class PodSizing:
    """Number and resources of the worker pods.

    Attributes:
        device: Device type of the workers.
        nodes: Number of worker pods.
        workers: Workers per pod.
        cpus: CPUs per pod.
        memory_bytes: Memory per pod, including shm_bytes.
        shm_bytes: Size limit of /dev/shm, including object_store_bytes.
        object_store_bytes: Size of Ray's object store.
        disk_bytes: Bytes per pod written to parallel.offload_path; None if nothing is written or unknown.
        notes: How the numbers were derived.
    """

    device: Literal["cuda", "cpu"]
    nodes: int
    workers: int
    cpus: int
    memory_bytes: int
    shm_bytes: int
    object_store_bytes: int
    disk_bytes: int | None
    notes: tuple[str, ...]

    @property
    def gpus(self) -> int:
        """GPUs per pod."""
        return self.workers if self.device == "cuda" else 0


def size_pods(job: JobSpec, options: PodOptions, device: Literal["cuda", "cpu"]) -> PodSizing:
    """Compute number and resources of a job's worker pods.

    Args:
        job: The job.
        options: Command-line options.
        device: Device type of the workers.

    Raises:
        SpecError: The workers do not divide evenly into pods, or the job uses a path that pods cannot see.
    """
    problems = [
        *_name_problems(options),
        *_worker_problems(job, options, device),
        *_path_problems(job, options),
        *_port_problems(job),
    ]
    if problems:
        raise SpecError(*problems)
    nodes, workers = _split_workers(job, options, device)
    offloaded, disk, notes = _offloaded(job, device)
    store = _OBJECT_STORE_BYTES[device]
    shm = store + _COLLECTIVES_BYTES[device]
    memory = _whole_gib(workers * (_WORKER_BYTES[device] + offloaded) + shm)
    parts = f"{workers} x {_gib(_WORKER_BYTES[device])} (default) + {_gib(shm)} of /dev/shm"
    parts += f" + {workers} x {_gib(offloaded)} of offloaded state" if offloaded else ""
    if options.memory_per_node is not None:
        memory, parts = options.memory_per_node * GIB, "--memory-per-node"
        if memory < workers * offloaded + shm:
            raise SpecError(
                f"--memory-per-node={options.memory_per_node} GiB is less than the offloaded state of "
                f"{workers} workers ({_gib(workers * offloaded)}) and {_gib(shm)} of /dev/shm; request more "
                "memory, or use more nodes"
            )
    cpus = options.cpus_per_node or workers * job.parallel.cpus_per_worker + _SPARE_CPUS
    return PodSizing(
        device=device,
        nodes=nodes,
        workers=workers,
        cpus=cpus,
        memory_bytes=memory,
        shm_bytes=shm,
        object_store_bytes=store,
        disk_bytes=None if disk is None else _whole_gib(workers * disk),
        notes=(
            *_sequence_parallel_notes(job, workers, nodes),
            f"memory per worker pod: {_gib(memory)} = {parts}",
            *notes,
        ),
    )


def _split_workers(job: JobSpec, options: PodOptions, device: Literal["cuda", "cpu"]) -> tuple[int, int]:
    """Return the number of pods and the workers per pod."""
    workers = job.parallel.workers
    if device == "cpu":
        nodes = options.nodes or 1
        return nodes, workers // nodes
    per_node = min(workers, options.gpus_per_node or GPUS_PER_NODE)
    return workers // per_node, per_node


def _sequence_parallel_notes(job: JobSpec, workers: int, nodes: int) -> Iterator[str]:
    size = job.parallel.sequence_parallel_size
    if nodes > 1 and workers % size:
        yield (
            f"sequence_parallel_size={size} does not divide the {workers} workers of a pod: "
            "sequence-parallel groups span nodes, which is slower"
        )


def _name_problems(options: PodOptions) -> Iterator[str]:
    for option, name in (("--claim", options.claim), ("--namespace", options.namespace)):
        if name is not None and not (_DNS_1123.fullmatch(name) and len(name) <= 63):
            yield (
                f"{option}={name} is not a valid Kubernetes name; use at most 63 lower-case letters, digits "
                "and dashes, without a leading or trailing dash"
            )


def _worker_problems(job: JobSpec, options: PodOptions, device: Literal["cuda", "cpu"]) -> Iterator[str]:
    workers = job.parallel.workers
    for option, value in (
        ("--gpus-per-node", options.gpus_per_node),
        ("--nodes", options.nodes),
        ("--cpus-per-node", options.cpus_per_node),
        ("--memory-per-node", options.memory_per_node),
        ("--deadline-hours", options.deadline_hours),
    ):
        if value is not None and value < 1:
            yield f"{option}={value} is below 1; use 1 or more"
            return
    if device == "cpu" and options.gpus_per_node is not None:
        yield (
            f"--gpus-per-node={options.gpus_per_node} requires GPUs; use --nodes for a CPU job, or "
            "set parallel.device: cuda"
        )
        return
    if device == "cuda" and options.nodes is not None:
        yield (
            f"--nodes={options.nodes} is only for CPU jobs; on GPUs the number of nodes follows from "
            f"parallel.workers={workers} and --gpus-per-node; omit --nodes"
        )
        return
    nodes, per_node = _split_workers(job, options, device)
    if nodes * per_node != workers or not per_node:
        option = f"--nodes={nodes}" if device == "cpu" else f"--gpus-per-node={per_node}"
        divisors = [n for n in range(1, workers + 1) if workers % n == 0]
        yield (
            f"{option} does not divide parallel.workers={workers}, and all worker pods have the same "
            f"number of workers; use one of {divisors[-8:]}, or change parallel.workers"
        )
    if options.cpus_per_node is not None and options.cpus_per_node < per_node * job.parallel.cpus_per_worker:
        yield (
            f"--cpus-per-node={options.cpus_per_node} does not fit {per_node} workers with "
            f"parallel.cpus_per_worker={job.parallel.cpus_per_worker}; use at least "
            f"{per_node * job.parallel.cpus_per_worker}"
        )


def _path_problems(job: JobSpec, options: PodOptions) -> Iterator[str]:
    """Yield a problem for each path that is not visible to the pods."""
    mount = PurePosixPath(options.mount)
    if not mount.is_absolute() or mount == PurePosixPath("/"):
        yield f"--mount={options.mount} is not an absolute path for a volume; use a path such as /mnt/shared"
        return
    storage = PurePosixPath(job.checkpoint.storage)
    if not storage.is_relative_to(mount):
        yield (
            f"checkpoint.storage={job.checkpoint.storage} is not under {mount}, the mount path of the shared "
            f"volume, and would be deleted with its pod; use --set checkpoint.storage={mount}/runs, or "
            "--mount"
        )
    named = [("model.path", job.model.path), *(("data path", source.path) for _, source in all_sources(job))]
    if job.method.adapter:
        named.append(("method.adapter", job.method.adapter))
    for field, path in named:
        if _is_local(path) and not PurePosixPath(path).is_relative_to(mount):
            yield (
                f"{field}={path} is a local path, but pods only see {mount}; copy it there and use the "
                "absolute path, or use a URI or a hub name"
            )
    if job.parallel.offload_path and not PurePosixPath(job.parallel.offload_path).is_absolute():
        yield (
            f"parallel.offload_path={job.parallel.offload_path} is relative; use the absolute path at which "
            "the pods mount their local disk, such as /mnt/offload"
        )


def _is_local(path: str) -> bool:
    """Return whether a path is local: not built in, not a URI and not a hub name."""
    if path.startswith("builtin/") or "://" in path:
        return False
    return path.startswith(("/", ".", "~")) or Path(path).suffix in _DATA_ENDINGS or Path(path).exists()


def _port_problems(job: JobSpec) -> Iterator[str]:
    ray_ports = {**RAY_PORTS, "agent": _AGENT_PORT}
    for name, port in ray_ports.items():
        if job.metrics.port == port:
            yield f"metrics.port={port} is used by Ray's {name} in the same pod; use 9400 or another port"


def _offloaded(job: JobSpec, device: Literal["cuda", "cpu"]) -> tuple[int, int | None, list[str]]:
    """Return host memory and disk bytes per worker for offloaded state, and notes."""
    parallel = job.parallel
    if {parallel.offload_optimizer, parallel.offload_param, parallel.offload_activations} == {"none"}:
        return 0, None, []
    config = local_config(job.model.path)
    config = None if config is None else resized(config, job.model)
    count = None if config is None else parameter_count(config, job.method)
    model = None if config is None else Model.from_config(config)
    if config is None or count is None or model is None:
        reason = "has no local config.json" if config is None else "has an unknown architecture"
        note = f"offloaded state is NOT included: model.path={job.model.path} {reason}; set --memory-per-node"
        return 0, None, [note]
    ds_config = render(job, resolve_dtype(job.model.dtype, device), device)
    size_nvme_buffers(ds_config, -(-count.largest // parallel.workers))
    memory = host_memory_of_workload(workload_from_job(job, config, model, parallel.workers, device)).total
    notes = [
        f"offloaded state is computed from {count.total:,} parameters, {count.trained:,} of them trainable"
    ]
    on_disk = disk_bytes(ds_config, count, parallel.workers) or None
    return memory, on_disk, notes


def _whole_gib(size_bytes: int) -> int:
    return -(-size_bytes // GIB) * GIB


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.4g} GiB"
