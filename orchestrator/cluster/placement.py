"""Checks whether a worker group fits on the nodes of a cluster. Pure functions.

A worker cannot span nodes, so resources are counted per node: two nodes with one GPU each cannot hold a
worker that needs two GPUs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.cluster.topology import Node


def capacity(
    nodes: Iterable[Node], cpus_per_worker: float, gpus_per_worker: float, memory_per_worker: int = 0
) -> int:
    """Return how many workers fit on the live nodes, ignoring other jobs on them.

    Args:
        nodes: Nodes of the cluster; dead ones are ignored.
        cpus_per_worker: Logical CPUs per worker.
        gpus_per_worker: GPUs per worker.
        memory_per_worker: Host memory per worker in bytes; 0 reserves none.

    Raises:
        ValueError: A worker requests a negative amount, or neither CPUs nor GPUs.
    """
    if min(cpus_per_worker, gpus_per_worker) < 0 or cpus_per_worker + gpus_per_worker == 0:
        raise ValueError(
            f"a worker with {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs cannot be placed;"
            f" both must be 0 or more and at least one above 0; request at least 1 CPU"
        )
    return sum(
        _fits(node, cpus_per_worker, gpus_per_worker, memory_per_worker) for node in nodes if node.alive
    )


def placement_problem(
    nodes: Sequence[Node],
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    memory_per_worker: int = 0,
) -> str | None:
    """Return why a worker group cannot be placed on the nodes, or None if it fits.

    Args:
        nodes: Nodes of the cluster with their total resources.
        workers: Number of workers, all of the same size and running at the same time.
        cpus_per_worker: Logical CPUs per worker.
        gpus_per_worker: GPUs per worker.
        memory_per_worker: Host memory per worker in bytes; 0 reserves none.

    Returns:
        None if the group fits; else a sentence with the request, the resources of every node, and a remedy.

    Raises:
        ValueError: The number of workers is not positive, or as for `capacity`.
    """
    if workers < 1:
        raise ValueError(
            f"workers={workers}; a worker group needs at least one worker: set parallel.workers to 1 or more"
        )
    max_workers = capacity(nodes, cpus_per_worker, gpus_per_worker, memory_per_worker)
    if workers <= max_workers:
        return None
    size = _size(cpus_per_worker, gpus_per_worker, memory_per_worker or None)
    have = "; ".join(_describe(node, memory_per_worker > 0) for node in nodes) or "there are no nodes"
    if workers <= capacity(nodes, cpus_per_worker, gpus_per_worker):
        remedy = (
            "use nodes with more memory, or more nodes; if a node has more memory than Ray reports, start "
            "its Ray with --memory=BYTES"
        )
    elif max_workers:
        remedy = f"set parallel.workers to at most {max_workers} or add nodes"
    else:
        remedy = "request less per worker or add larger nodes"
    request = f"{_count(workers, 'worker')} with {size} each"
    return f"{request} cannot be placed, since a worker cannot span nodes: {have}; {remedy}"


def _fits(node: Node, cpus_per_worker: float, gpus_per_worker: float, memory_per_worker: int) -> int:
    resources = ((node.cpus, cpus_per_worker), (node.gpus, gpus_per_worker))
    # 1e-6 absorbs rounding: 0.3 CPUs fit three workers of 0.1 CPUs, but 0.3 / 0.1 < 3.
    fits = min(math.floor(total / per_worker + 1e-6) for total, per_worker in resources if per_worker)
    return min(fits, node.memory_bytes // memory_per_worker) if memory_per_worker else fits


def _describe(node: Node, with_memory: bool) -> str:
    if not node.alive:
        return f"{node.address} is dead"
    return f"{node.address} has {_size(node.cpus, node.gpus, node.memory_bytes if with_memory else None)}"


def _size(cpus: float, gpus: float, memory_bytes: int | None) -> str:
    counts = f"{_count(cpus, 'CPU')}{' and' if memory_bytes is None else ','} {_count(gpus, 'GPU')}"
    return counts if memory_bytes is None else f"{counts} and {memory_bytes / 2**30:.4g} GiB of memory"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
