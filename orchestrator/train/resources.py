"""Whether the cluster holds the worker group: decided by the driver, before a worker is started."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ray

from orchestrator.arch.parameters import ParameterCount
from orchestrator.cluster.placement import placement_problem
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.planner.host_memory import host_memory
from orchestrator.train import ray_session

_POLL_SECONDS = 0.5
_BUSY_WAIT_SECONDS = 30.0
_GIB = 2**30


def place(job: JobSpec) -> Literal["cuda", "cpu"]:
    """Return the kind of device that the job runs on.

    Raises:
        ClusterError: The cluster cannot hold the workers, or other jobs leave no room for them.
    """
    parallel, nodes = job.parallel, ray_session.live_nodes()
    found: Literal["cuda", "cpu"] = "cuda" if any(node.gpus for node in nodes) else "cpu"
    device = found if parallel.device == "auto" else parallel.device
    gpus = 1 if device == "cuda" else 0
    problem = placement_problem(nodes, parallel.workers, parallel.cpus_per_worker, gpus)
    if problem:
        raise ClusterError(problem)
    _wait_until_free({"CPU": parallel.workers * parallel.cpus_per_worker, "GPU": parallel.workers * gpus})
    return device


def reserve_host_memory(
    job: JobSpec,
    device: Literal["cuda", "cpu"],
    ds_config: Mapping[str, Any],
    count: ParameterCount | None,
    note: Callable[[str], None],
) -> int:
    """Return the bytes of host memory that each worker has to reserve for what is offloaded.

    Args:
        job: The job.
        device: Kind of device.
        ds_config: The rendered DeepSpeed configuration.
        count: The model's parameters; None where they cannot be counted without building the model.
        note: Told what is reserved, or that nothing can be.

    Raises:
        ClusterError: The nodes do not have that much, or other jobs hold it.
    """
    parallel = job.parallel
    if parallel.offload_optimizer == parallel.offload_param == "none":
        return 0
    if count is None:
        note(f"model.path={job.model.path} cannot be counted beforehand: no host memory is reserved for it")
        return 0
    needed = host_memory(ds_config, count, parallel.workers)
    parts = f"optimizer {_size(needed.optimizer)}, parameters {_size(needed.parameters)}"
    parts += f", the model while it is built {_size(needed.building)}" if needed.building else ""
    reason = (
        f"{count.total:,} parameters, {count.trained:,} of them trained, offloaded by {parallel.workers} "
        f"workers ({parts} each, and half as much again for buffers)"
    )
    gpus = 1 if device == "cuda" else 0
    problem = placement_problem(
        ray_session.live_nodes(), parallel.workers, parallel.cpus_per_worker, gpus, needed.total
    )
    if problem:
        raise ClusterError(
            f"{problem}; the memory is for {reason}; more parallel.workers hold less each, and method.type: "
            "lora trains fewer parameters"
        )
    note(f"each worker reserves {_size(needed.total)} of host memory: {reason}")
    _wait_until_free({"memory": parallel.workers * needed.total})
    return needed.total


def _wait_until_free(wanted: Mapping[str, float]) -> None:
    """Wait a moment for what another job is about to give back.

    Raises:
        ClusterError: It is not free in time.
    """
    deadline = time.monotonic() + _BUSY_WAIT_SECONDS
    while True:
        free = ray.available_resources()
        short = [
            f"{name}: {_amount(name, free.get(name, 0))} free of {_amount(name, n)} wanted"
            for name, n in wanted.items()
            if free.get(name, 0) < n
        ]
        if not short:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the cluster is large enough, and other jobs hold it ({'; '.join(short)}); wait for "
                "them, or stop one"
            )
        time.sleep(_POLL_SECONDS)


def _amount(name: str, number: float) -> str:
    return _size(number) if name == "memory" else f"{number:g}"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / _GIB:.4g} GiB"
