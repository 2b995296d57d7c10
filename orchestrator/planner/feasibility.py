"""Whether a job fits on the nodes of a cluster: what `train` and `submit` ask before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.cluster.cluster_spec import Machines
from orchestrator.cluster.hardware import Device
from orchestrator.cluster.topology import Node
from orchestrator.config.schema import JobSpec
from orchestrator.planner.estimate import Constants, Prediction
from orchestrator.planner.formatting import changed, figures
from orchestrator.planner.search import cheapest_changes


def gpu_machines(job: JobSpec, nodes: Sequence[Node], gpu: Device) -> Machines | None:
    """Return the GPUs that a job is spread over; None where no node has one.

    Args:
        job: The job.
        nodes: The live nodes.
        gpu: What each of their GPUs is.
    """
    workers, each = job.parallel.workers, max((int(node.gpus) for node in nodes), default=0)
    return Machines(-(-workers // each), min(each, workers), gpu) if each else None


def processor_places(job: JobSpec, nodes: Sequence[Node]) -> tuple[int, float] | None:
    """Return how many workers the largest node takes, and the bytes that each has where there is least.

    Args:
        job: The job.
        nodes: The live nodes.

    Returns:
        None where no node takes a worker, or one does not say how much memory it offers.
    """
    places = {node.address: int(node.cpus) // job.parallel.cpus_per_worker for node in nodes}
    each = min(job.parallel.workers, max(places.values(), default=0))
    memory = min((node.memory_bytes for node in nodes if places[node.address] >= 1), default=0)
    return (each, memory / each) if each and memory else None


def refusal(
    job: JobSpec, config: Mapping[str, Any], machines: Machines, found: Prediction, constants: Constants
) -> str:
    """Return why a job is refused, with the changes that would help most.

    Args:
        job: The job.
        config: Its model's config.json.
        machines: What it was to run on.
        found: What was predicted.
        constants: What is known of the stack.
    """
    remedies = [
        f"({number}) {changed(each.changes)} ({figures(each.candidate.prediction)})"
        for number, each in enumerate(cheapest_changes(job, config, machines, constants), 1)
    ]
    instead = f"it would with {', '.join(remedies)}" if remedies else "nothing that could be tried makes it"
    return f"{job.name} on {machines} {figures(found)}; {instead}; --force trains it all the same"
