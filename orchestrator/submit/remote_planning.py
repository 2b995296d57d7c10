"""Planning for a cluster that is only reached by its dashboard, before anything travels there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.arch.hf_config import config_of, resized
from orchestrator.cluster import hardware
from orchestrator.cluster.cluster_spec import Machines
from orchestrator.cluster.topology import Node, from_state_api
from orchestrator.config.auto_values import resolve_device
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError
from orchestrator.planner.calibration_store import constants_of, stack_of
from orchestrator.planner.cpu_benchmark import processor
from orchestrator.planner.feasibility import gpu_machines, processor_places, refusal
from orchestrator.planner.formatting import GIB, figures
from orchestrator.planner.search import asked_of

Ask = Callable[[str], Any]
"""Returns the JSON that the dashboard answers to a path."""
_NODES = "/api/v0/nodes?detail=1&limit=10000"
_SUMMARY = "/nodes?view=summary"


class Unplanned(Exception):
    """Why a job cannot be planned from here; `train` plans it again on the cluster."""


def require_fit(job: JobSpec, ask: Ask, force: bool, note: Callable[[str], None]) -> None:
    """Predict what a job needs on a cluster, and refuse what cannot fit.

    Where the model or the cluster is not known well enough, that is said and nothing is refused: the cluster
    plans as well, when it has the job.

    Args:
        job: The job.
        ask: Asks the dashboard.
        force: Go on whatever is predicted.
        note: Told what is predicted, or why nothing is.

    Raises:
        ClusterError: It does not fit, and is not forced; the changes that would help most are named.
    """
    try:
        config = resized(config_of(job.model.path), job.model)
        machines = machines_there(job, ask)
        plain = asked_of(job, config, machines)
    except Unplanned as reason:
        note(f"not planned from here, but by train on the cluster: {reason}")
        return
    except SpecError as reason:
        note(f"not planned from here, but by train on the cluster: {'; '.join(reason.problems)}")
        return
    constants = constants_of(stack_of(plain.prediction.work, machines))
    found = asked_of(job, config, machines, constants).prediction
    if found.verdict == "does not fit" and not force:
        raise ClusterError(refusal(job, config, machines, found, constants))
    forced = ", and forced" if found.verdict == "does not fit" else ""
    note(f"planned{forced} for {machines}: {figures(found)}")


def machines_there(job: JobSpec, ask: Ask) -> Machines:
    """Return the machines of a cluster that a job is spread over.

    Args:
        job: The job.
        ask: Asks the dashboard.

    Raises:
        Unplanned: The cluster does not say what it has, or has a device that the catalogue does not know.
    """
    try:
        nodes = [node for node in from_state_api(ask(_NODES)["data"]["result"]["result"]) if node.alive]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unplanned(f"the dashboard does not list its nodes ({error!r})") from None
    gpus = any(node.gpus for node in nodes)
    if resolve_device(job.parallel.device, gpus) == "cuda":
        found = gpu_machines(job, nodes, _gpu(ask))
    else:
        found = _processors(job, nodes)
    if found is None:
        raise Unplanned("no node offers what a worker takes")
    return found


def _processors(job: JobSpec, nodes: Sequence[Node]) -> Machines | None:
    places = processor_places(job, nodes)
    if places is None:
        return None
    each, memory = places
    return Machines(-(-job.parallel.workers // each), each, processor(memory / GIB))


def _gpu(ask: Ask) -> hardware.Device:
    """Return the device of a cluster's GPUs; where there are several, that with the least memory."""
    try:
        summary = ask(_SUMMARY)["data"]["summary"]
        names = {gpu["name"] for node in summary for gpu in node.get("gpus") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unplanned(f"the dashboard does not say what its GPUs are ({error!r})") from None
    known = {name: hardware.match(name) for name in names}
    unknown = [name for name, device in known.items() if device is None]
    if unknown or not known:
        what = f"does not know {', '.join(sorted(unknown))}" if unknown else "needs the name of a GPU"
        raise Unplanned(f"the hardware catalogue {what}")
    return min((each for each in known.values() if each), key=lambda device: device.memory_gib)
