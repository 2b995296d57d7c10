"""How many pods a job takes on Kubernetes, and how large they are, told from the job file alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from orchestrator.arch.hf_config import local_config, resized
from orchestrator.arch.parameters import parameter_count
from orchestrator.config.auto_values import resolve_dtype
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.parallel.deepspeed_config import fit_buffers, render
from orchestrator.planner.estimate import work_of
from orchestrator.planner.host_memory import disk_bytes
from orchestrator.planner.memory import host_memory_of
from orchestrator.planner.workload import Model

GPUS_PER_NODE = 8
RAY_PORTS = {
    "gcs-server": 6379,
    "dashboard": 8265,
    "metrics": 8080,
    "as-metrics": 44217,
    "dash-metrics": 44227,
}
"""Ports of the head, by the names that KubeRay and its monitors give them."""
_AGENT_PORT = 52365  # of Ray's agent, which KubeRay's probes ask

GIB = 2**30
# Plain defaults, chosen and not measured; --memory-per-node and --cpus-per-node replace them.
_WORKER_BYTES = {"cuda": 16 * GIB, "cpu": 4 * GIB}
_OBJECT_STORE_BYTES = {"cuda": 8 * GIB, "cpu": 1 * GIB}
_COLLECTIVES_BYTES = {"cuda": 8 * GIB, "cpu": 1 * GIB}  # shared memory of NCCL or gloo
_SPARE_CPUS = 1  # for Ray's own processes and tokenising

_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DATA_ENDINGS = frozenset({".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow"})


@dataclass(frozen=True)
class Wanted:
    """What the user says of the cluster, beside the job.

    Attributes:
        image: Image of all pods; None takes that of this version, by device.
        gpus_per_node: GPUs of a node, each of which takes one worker.
        nodes: Pods of workers, on CPU only.
        cpus_per_node: Processors of a pod of workers.
        memory_per_node: GiB of memory of a pod of workers.
        claim: Claim of a volume that all pods can write.
        mount: Where it is mounted.
        namespace: Namespace of the objects; None leaves that to `kubectl -n`.
        deadline_hours: Hours after which KubeRay ends a try, finished or not.
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
class Size:
    """The pods of workers.

    Attributes:
        device: What the workers run on.
        nodes: How many pods there are.
        workers: Workers in each.
        cpus: Processors of each.
        memory_bytes: Memory of each, all of shm_bytes included.
        shm_bytes: Of this, what /dev/shm may take.
        object_store_bytes: Of this, what Ray's object store takes.
        disk_bytes: What each writes to parallel.offload_path; None where it writes nothing or cannot be told.
        notes: Sentences that say where the numbers come from.
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
        """GPUs of each pod."""
        return self.workers if self.device == "cuda" else 0


def size_of(job: JobSpec, wanted: Wanted, device: Literal["cuda", "cpu"]) -> Size:
    """Return how large the pods of a job's workers are.

    Args:
        job: The job.
        wanted: What the user says of the cluster.
        device: What the workers run on.

    Raises:
        SpecError: The job cannot be spread so, or names what no pod sees.
    """
    problems = [
        *_broken_names(wanted),
        *_broken_spreading(job, wanted, device),
        *_out_of_reach(job, wanted),
        *_taken_port(job),
    ]
    if problems:
        raise SpecError(*problems)
    nodes, workers = _spread(job, wanted, device)
    offloaded, disk, notes = _offloaded(job, device)
    store = _OBJECT_STORE_BYTES[device]
    shm = store + _COLLECTIVES_BYTES[device]
    memory = _whole_gib(workers * (_WORKER_BYTES[device] + offloaded) + shm)
    parts = f"{workers} x {_gib(_WORKER_BYTES[device])} (a plain default) + {_gib(shm)} of /dev/shm"
    parts += f" + {workers} x {_gib(offloaded)} for what is offloaded" if offloaded else ""
    if wanted.memory_per_node is not None:
        memory, parts = wanted.memory_per_node * GIB, "--memory-per-node"
        if memory < workers * offloaded + shm:
            raise SpecError(
                f"--memory-per-node={wanted.memory_per_node} GiB is less than {workers} workers hold of what "
                f"is offloaded, {_gib(workers * offloaded)}, and {_gib(shm)} of /dev/shm; give more, or "
                "spread the workers over more nodes"
            )
    cpus = wanted.cpus_per_node or workers * job.parallel.cpus_per_worker + _SPARE_CPUS
    return Size(
        device=device,
        nodes=nodes,
        workers=workers,
        cpus=cpus,
        memory_bytes=memory,
        shm_bytes=shm,
        object_store_bytes=store,
        disk_bytes=None if disk is None else _whole_gib(workers * disk),
        notes=(
            *_crossing(job, workers, nodes),
            f"memory of a pod of workers: {_gib(memory)} = {parts}",
            *notes,
        ),
    )


def _spread(job: JobSpec, wanted: Wanted, device: Literal["cuda", "cpu"]) -> tuple[int, int]:
    """Return pods and workers in each."""
    workers = job.parallel.workers
    if device == "cpu":
        nodes = wanted.nodes or 1
        return nodes, workers // nodes
    per_node = min(workers, wanted.gpus_per_node or GPUS_PER_NODE)
    return workers // per_node, per_node


def _crossing(job: JobSpec, workers: int, nodes: int) -> Iterator[str]:
    size = job.parallel.sequence_parallel_size
    if nodes > 1 and workers % size:
        yield (
            f"sequence_parallel_size={size} does not divide the {workers} workers of a pod: workers that "
            "share a sequence exchange it between nodes, which is slower"
        )


def _broken_names(wanted: Wanted) -> Iterator[str]:
    for option, name in (("--claim", wanted.claim), ("--namespace", wanted.namespace)):
        if name is not None and not (_DNS_1123.fullmatch(name) and len(name) <= 63):
            yield (
                f"{option}={name} is no name of a Kubernetes object; use at most 63 lower-case letters, "
                "digits and dashes, no dash first or last"
            )


def _broken_spreading(job: JobSpec, wanted: Wanted, device: Literal["cuda", "cpu"]) -> Iterator[str]:
    workers = job.parallel.workers
    for option, value in (
        ("--gpus-per-node", wanted.gpus_per_node),
        ("--nodes", wanted.nodes),
        ("--cpus-per-node", wanted.cpus_per_node),
        ("--memory-per-node", wanted.memory_per_node),
        ("--deadline-hours", wanted.deadline_hours),
    ):
        if value is not None and value < 1:
            yield f"{option}={value} is below 1; give 1 or more"
            return
    if device == "cpu" and wanted.gpus_per_node is not None:
        yield (
            f"--gpus-per-node={wanted.gpus_per_node} does not go with a job on CPU; leave it out and spread "
            "the workers with --nodes, or set parallel.device: cuda"
        )
        return
    if device == "cuda" and wanted.nodes is not None:
        yield (
            f"--nodes={wanted.nodes} is for jobs on CPU; with GPUs the nodes follow from parallel.workers="
            f"{workers} and --gpus-per-node"
        )
        return
    nodes, per_node = _spread(job, wanted, device)
    if nodes * per_node != workers or not per_node:
        option = f"--nodes={nodes}" if device == "cpu" else f"--gpus-per-node={per_node}"
        divisors = [n for n in range(1, workers + 1) if workers % n == 0]
        yield (
            f"{option} does not divide parallel.workers={workers}, and all pods of workers are alike; use "
            f"one of {divisors[-8:]}, or change parallel.workers"
        )
    if wanted.cpus_per_node is not None and wanted.cpus_per_node < per_node * job.parallel.cpus_per_worker:
        yield (
            f"--cpus-per-node={wanted.cpus_per_node} holds no {per_node} workers of "
            f"parallel.cpus_per_worker={job.parallel.cpus_per_worker}; give at least "
            f"{per_node * job.parallel.cpus_per_worker}"
        )


def _out_of_reach(job: JobSpec, wanted: Wanted) -> Iterator[str]:
    """Yield a sentence for each path that no pod would see."""
    mount = PurePosixPath(wanted.mount)
    if not mount.is_absolute() or mount == PurePosixPath("/"):
        yield f"--mount={wanted.mount} is no folder to mount a volume on; use a path such as /mnt/shared"
        return
    storage = PurePosixPath(job.checkpoint.storage)
    if not storage.is_relative_to(mount):
        yield (
            f"checkpoint.storage={job.checkpoint.storage} is not below {mount}, where the pods share a "
            f"volume, and would be lost with its pod; use --set checkpoint.storage={mount}/runs, or --mount"
        )
    sources = [*job.data.train, *(job.eval.data if job.eval else ())]
    named = [("model.path", job.model.path), *(("data path", source.path) for source in sources)]
    if job.method.adapter:
        named.append(("method.adapter", job.method.adapter))
    for field, path in named:
        if _is_local(path) and not PurePosixPath(path).is_relative_to(mount):
            yield (
                f"{field}={path} is a local file or folder, and pods see {mount} only; put it there and name "
                "it by its absolute path, or name a URI or a hub"
            )
    if job.parallel.offload_path and not PurePosixPath(job.parallel.offload_path).is_absolute():
        yield (
            f"parallel.offload_path={job.parallel.offload_path} is relative; name the absolute path at which "
            "the pods' own disk is to be mounted, such as /mnt/offload"
        )


def _is_local(path: str) -> bool:
    """Tell a path from what ships with the package, a URI and a hub's name."""
    if path.startswith("builtin/") or "://" in path:
        return False
    return path.startswith(("/", ".", "~")) or Path(path).suffix in _DATA_ENDINGS or Path(path).exists()


def _taken_port(job: JobSpec) -> Iterator[str]:
    taken = {**RAY_PORTS, "agent": _AGENT_PORT}
    for name, port in taken.items():
        if job.metrics.port == port:
            yield f"metrics.port={port} is that of Ray's {name} in the same pod; use 9400 or another one"


def _offloaded(job: JobSpec, device: Literal["cuda", "cpu"]) -> tuple[int, int | None, list[str]]:
    """Return host memory and disk that a worker needs for what is offloaded, and what is to be said of it."""
    parallel = job.parallel
    if {parallel.offload_optimizer, parallel.offload_param, parallel.offload_activations} == {"none"}:
        return 0, None, []
    config = local_config(job.model.path)
    config = None if config is None else resized(config, job.model)
    count = None if config is None else parameter_count(config, job.method)
    model = None if config is None else Model.of(config)
    if config is None or count is None or model is None:
        reason = "has no config.json here" if config is None else "is of an architecture that is not known"
        note = (
            f"what is offloaded is NOT in it: model.path={job.model.path} {reason}, so it cannot be counted; "
            "give --memory-per-node"
        )
        return 0, None, [note]
    ds_config = render(job, resolve_dtype(job.model.dtype, device), device)
    fit_buffers(ds_config, -(-count.largest // parallel.workers))
    memory = host_memory_of(work_of(job, config, model, parallel.workers, device)).total
    notes = [f"what is offloaded is counted of {count.total:,} parameters, {count.trained:,} of them trained"]
    on_disk = disk_bytes(ds_config, count, parallel.workers) or None
    return memory, on_disk, notes


def _whole_gib(size_bytes: int) -> int:
    return -(-size_bytes // GIB) * GIB


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.4g} GiB"
