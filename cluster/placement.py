"""Whether a worker group fits on the nodes: pure functions that return decisions and touch no cluster.

A worker runs inside one node, so resources are counted node by node: two nodes with one GPU each cannot hold
a worker that needs two, although the sum says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.topology import Node


def capacity(nodes: Iterable[Node], cpus_per_worker: float, gpus_per_worker: float) -> int:
    """Return how many workers of one size the live nodes hold, whatever else may run on them.

    Args:
        nodes: Nodes of the cluster; dead ones count for nothing.
        cpus_per_worker: Logical processors one worker takes.
        gpus_per_worker: Accelerators one worker takes.

    Raises:
        ValueError: A worker takes a negative amount, or nothing at all, so that no number would be too many.
    """
    if min(cpus_per_worker, gpus_per_worker) < 0 or cpus_per_worker + gpus_per_worker == 0:
        raise ValueError(
            f"a worker that takes {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs cannot be placed;"
            f" both must be 0 or more and at least one above 0: ask for 1 CPU if nothing else"
        )
    return sum(_fits(node, cpus_per_worker, gpus_per_worker) for node in nodes if node.alive)


def missing(
    nodes: Sequence[Node], workers: int, cpus_per_worker: float, gpus_per_worker: float
) -> str | None:
    """Say why a worker group cannot be placed on the nodes.

    Args:
        nodes: Nodes of the cluster with their total resources.
        workers: Number of workers, all of one size and all running at once.
        cpus_per_worker: Logical processors one worker takes.
        gpus_per_worker: Accelerators one worker takes.

    Returns:
        None when the group fits; else one sentence with what is asked, what every node has, and a remedy.

    Raises:
        ValueError: The number of workers is not positive, or as for `capacity`.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}; a worker group needs one: set parallel.workers to 1 or more")
    room = capacity(nodes, cpus_per_worker, gpus_per_worker)
    if workers <= room:
        return None
    size = f"{_count(cpus_per_worker, 'CPU')} and {_count(gpus_per_worker, 'GPU')}"
    have = "; ".join(map(_describe, nodes)) or "there are no nodes"
    if room:
        remedy = f"set parallel.workers to at most {room} or add nodes"
    else:
        remedy = "ask for less per worker or add nodes that have this much each"
    asked = f"{_count(workers, 'worker')} with {size} each"
    return f"{asked} cannot be placed, since a worker cannot span nodes: {have}; {remedy}"


def _fits(node: Node, cpus_per_worker: float, gpus_per_worker: float) -> int:
    asked = ((node.cpus, cpus_per_worker), (node.gpus, gpus_per_worker))
    # The small term forgives binary fractions: 0.3 CPUs hold three workers of 0.1, though 0.3 / 0.1 < 3.
    return min(math.floor(offered / taken + 1e-6) for offered, taken in asked if taken)


def _describe(node: Node) -> str:
    if not node.alive:
        return f"{node.address} is dead"
    return f"{node.address} has {_count(node.cpus, 'CPU')} and {_count(node.gpus, 'GPU')}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
