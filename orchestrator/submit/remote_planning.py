"""Memory planning for a remote cluster from its dashboard, before anything is uploaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.arch.hf_config import load_config_json, resized
from orchestrator.cluster import hardware
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.cluster.topology import Node, from_state_api
from orchestrator.config.auto_values import resolve_device
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError
from orchestrator.planner.calibration_store import load_calibration, software_stack_of
from orchestrator.planner.cpu_benchmark import cpu_device
from orchestrator.planner.feasibility import cpu_worker_slots, gpu_cluster, refusal
from orchestrator.planner.formatting import GIB, format_prediction
from orchestrator.planner.search import predict_job

_logger = logging.getLogger(__name__)

Fetch = Callable[[str], Any]
"""GET request for a path of the dashboard; returns the parsed JSON."""
_NODES = "/api/v0/nodes?detail=1&limit=10000"
_SUMMARY = "/nodes?view=summary"


class PlanningUnavailable(Exception):
    """The job cannot be planned locally; `train` plans it on the cluster."""


def require_fit(job: JobSpec, fetch: Fetch, force: bool) -> None:
    """Predict the memory of a job on a cluster and reject it if it does not fit.

    If the model or the cluster is not known well enough, the reason is noted and the job is accepted; `train`
    plans again on the cluster.

    Args:
        job: The job.
        fetch: Sends GET requests to the dashboard.
        force: Accept the job even if it is predicted not to fit.

    Raises:
        ClusterError: The job does not fit and force is False; suggests changes.
    """
    try:
        config = resized(load_config_json(job.model.path), job.model)
        cluster = cluster_from_dashboard(job, fetch)
        plain = predict_job(job, config, cluster)
    except PlanningUnavailable as reason:
        _logger.info(f"not planned locally, train plans it on the cluster: {reason}")
        return
    except SpecError as reason:
        _logger.info(f"not planned locally, train plans it on the cluster: {'; '.join(reason.problems)}")
        return
    calibration = load_calibration(software_stack_of(plain.prediction.work, cluster))
    prediction = predict_job(job, config, cluster, calibration).prediction
    if prediction.verdict == "does not fit" and not force:
        raise ClusterError(refusal(job, config, cluster, prediction, calibration))
    forced = ", and forced" if prediction.verdict == "does not fit" else ""
    _logger.info(f"planned{forced} for {cluster}: {format_prediction(prediction)}")


def cluster_from_dashboard(job: JobSpec, fetch: Fetch) -> ClusterSpec:
    """Return the nodes and devices of a cluster that a job would use.

    Args:
        job: The job.
        fetch: Sends GET requests to the dashboard.

    Raises:
        PlanningUnavailable: The dashboard does not list nodes or GPUs, or a GPU is not in the catalogue.
    """
    try:
        nodes = [node for node in from_state_api(fetch(_NODES)["data"]["result"]["result"]) if node.alive]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanningUnavailable(f"the dashboard does not list its nodes ({error!r})") from None
    gpus = any(node.gpus for node in nodes)
    if resolve_device(job.parallel.device, gpus) == "cuda":
        cluster = gpu_cluster(job, nodes, _gpu(fetch))
    else:
        cluster = _cpu_nodes(job, nodes)
    if cluster is None:
        raise PlanningUnavailable("no node has enough resources for a worker")
    return cluster


def _cpu_nodes(job: JobSpec, nodes: Sequence[Node]) -> ClusterSpec | None:
    slots = cpu_worker_slots(job, nodes)
    if slots is None:
        return None
    workers_per_node, memory_bytes = slots
    nodes_used = -(-job.parallel.workers // workers_per_node)
    return ClusterSpec(nodes_used, workers_per_node, cpu_device(memory_bytes / GIB))


def _gpu(fetch: Fetch) -> hardware.Device:
    """Return the GPU model of a cluster; of several models, the one with the least memory."""
    try:
        summary = fetch(_SUMMARY)["data"]["summary"]
        names = {gpu["name"] for node in summary for gpu in node.get("gpus") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanningUnavailable(f"the dashboard does not list GPU names ({error!r})") from None
    known = {name: hardware.match(name) for name in names}
    unknown = [name for name, device in known.items() if device is None]
    if unknown or not known:
        names_text = ", ".join(sorted(unknown))
        raise PlanningUnavailable(
            f"{names_text} is not in the hardware catalogue" if unknown else "the dashboard lists no GPU name"
        )
    return min((device for device in known.values() if device), key=lambda device: device.memory_gib)
