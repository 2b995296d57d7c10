"""Predicts whether a job fits on the live nodes of a cluster; shared by `train` and `submit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.cluster.hardware import Device
from orchestrator.cluster.topology import Node
from orchestrator.config.schema import JobSpec
from orchestrator.planner.estimate import CalibrationParams, Prediction
from orchestrator.planner.formatting import format_changes, format_prediction
from orchestrator.planner.search import suggest_changes


def gpu_cluster(job: JobSpec, nodes: Sequence[Node], gpu: Device) -> ClusterSpec | None:
    """Return the nodes and GPUs that a job uses, or None if no node has a GPU.

    Args:
        job: The job.
        nodes: The live nodes.
        gpu: The GPU model of every node.
    """
    workers = job.parallel.workers
    gpus_per_node = max((int(node.gpus) for node in nodes), default=0)
    if not gpus_per_node:
        return None
    return ClusterSpec(-(-workers // gpus_per_node), min(gpus_per_node, workers), gpu)


def cpu_worker_slots(job: JobSpec, nodes: Sequence[Node]) -> tuple[int, float] | None:
    """Return the worker slots of the largest CPU node and the memory in bytes per worker.

    The memory is that of the smallest node that has a slot, so the prediction is conservative.

    Args:
        job: The job.
        nodes: The live nodes.

    Returns:
        None if no node has a slot, or a node with a slot reports no memory.
    """
    slots = {node.address: int(node.cpus) // job.parallel.cpus_per_worker for node in nodes}
    workers_per_node = min(job.parallel.workers, max(slots.values(), default=0))
    memory_bytes = min((node.memory_bytes for node in nodes if slots[node.address] >= 1), default=0)
    if not workers_per_node or not memory_bytes:
        return None
    return workers_per_node, memory_bytes / workers_per_node


def refusal(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    prediction: Prediction,
    calibration: CalibrationParams,
) -> str:
    """Return the error message for a job that does not fit, with the changes that would help most.

    Args:
        job: The job.
        config: The model's config.json.
        cluster: The nodes and devices that the job would use.
        prediction: The prediction for the job as written.
        calibration: Calibration of the software stack.
    """
    options = [
        f"({number}) {format_changes(suggestion.changes)} "
        f"({format_prediction(suggestion.candidate.prediction)})"
        for number, suggestion in enumerate(suggest_changes(job, config, cluster, calibration), 1)
    ]
    remedy = f"it would fit with {', '.join(options)}" if options else "no configuration that was tried fits"
    summary = format_prediction(prediction)
    return f"{job.name} on {cluster} {summary}; {remedy}. Use --force to train anyway."
