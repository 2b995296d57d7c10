"""Whether a worker group fits on the nodes: pure functions that return decisions and touch no cluster.

A worker runs inside one node, so resources are counted node by node: two nodes with one GPU each cannot hold
a worker that needs two, although the sum says so.
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
    """Return how many workers of one size the live nodes hold, whatever else may run on them.

    Args:
        nodes: Nodes of the cluster; dead ones count for nothing.
        cpus_per_worker: Logical processors one worker takes.
        gpus_per_worker: Accelerators one worker takes.
        memory_per_worker: Main memory one worker reserves, in bytes; 0 where it reserves none.

    Raises:
        ValueError: A worker takes a negative amount, or nothing at all, so that no number would be too many.
    """
    if min(cpus_per_worker, gpus_per_worker) < 0 or cpus_per_worker + gpus_per_worker == 0:
        raise ValueError(
            f"a worker that takes {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs cannot be placed;"
            f" both must be 0 or more and at least one above 0: ask for 1 CPU if nothing else"
        )
    return sum(
        _fits(node, cpus_per_worker, gpus_per_worker, memory_per_worker) for node in nodes if node.alive
    )


def missing(
    nodes: Sequence[Node],
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    memory_per_worker: int = 0,
) -> str | None:
    """Say why a worker group cannot be placed on the nodes.

    Args:
        nodes: Nodes of the cluster with their total resources.
        workers: Number of workers, all of one size and all running at once.
        cpus_per_worker: Logical processors one worker takes.
        gpus_per_worker: Accelerators one worker takes.
        memory_per_worker: Main memory one worker reserves, in bytes; 0 where it reserves none.

    Returns:
        None when the group fits; else one sentence with what is asked, what every node has, and a remedy.

    Raises:
        ValueError: The number of workers is not positive, or as for `capacity`.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}; a worker group needs one: set parallel.workers to 1 or more")
    room = capacity(nodes, cpus_per_worker, gpus_per_worker, memory_per_worker)
    if workers <= room:
        return None
    size = _size(cpus_per_worker, gpus_per_worker, memory_per_worker or None)
    have = "; ".join(_describe(node, memory_per_worker > 0) for node in nodes) or "there are no nodes"
    if workers <= capacity(nodes, cpus_per_worker, gpus_per_worker):
        remedy = (
            "use nodes with more memory, or more of them; if a node has more than it offers, start its Ray "
            "with --memory=BYTES"
        )
    elif room:
        remedy = f"set parallel.workers to at most {room} or add nodes"
    else:
        remedy = "ask for less per worker or add nodes that have this much each"
    asked = f"{_count(workers, 'worker')} with {size} each"
    return f"{asked} cannot be placed, since a worker cannot span nodes: {have}; {remedy}"


def _fits(node: Node, cpus_per_worker: float, gpus_per_worker: float, memory_per_worker: int) -> int:
    asked = ((node.cpus, cpus_per_worker), (node.gpus, gpus_per_worker))
    # The small term forgives binary fractions: 0.3 CPUs hold three workers of 0.1, though 0.3 / 0.1 < 3.
    fits = min(math.floor(offered / taken + 1e-6) for offered, taken in asked if taken)
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
