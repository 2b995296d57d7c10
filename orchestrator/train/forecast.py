"""The plan before the spending: what a job will need on this cluster, and a refusal in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray

from cluster import hardware
from cluster.hardware import Device
from cluster.machines import Machines
from orchestrator.errors import ClusterError
from orchestrator.model.build import load_config
from orchestrator.plan.planner import asked_of, cheapest_changes
from orchestrator.plan.prediction import Constants
from orchestrator.plan.wording import changed, figures
from orchestrator.plan.work import Model
from orchestrator.spec import JobSpec
from orchestrator.train import session

PLAN = "plan.json"
_GIB = 2**30


def require_fit(
    job: JobSpec, device: Literal["cuda", "cpu"], home: Path, force: bool, note: Callable[[str], None]
) -> None:
    """Predict what a job needs and takes, keep that as plan.json, and refuse what cannot fit.

    Args:
        job: The job.
        device: What it runs on.
        home: The run's folder.
        force: Go on whatever is predicted.
        note: Told what is predicted.

    Raises:
        ClusterError: It does not fit, and is not forced; the changes that would help most are named.
    """
    config = load_config(job.model).get_text_config().to_dict()
    if Model.of(config) is None:
        note(f"not planned: the sizes of the family {config.get('model_type')!r} are not known")
        return
    machines, constants = _machines(job, device), Constants()
    asked = asked_of(job, config, machines, constants)
    found = {"machines": str(machines), "settings": asked.settings, **asked.prediction.as_json()}
    (home / PLAN).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    said = figures(asked.prediction)
    if asked.prediction.verdict != "does not fit":
        note(f"planned: {said}")
        return
    if force:
        note(f"planned, and forced: {said}")
        return
    remedies = [
        f"({number}) {changed(each.changes)} ({figures(each.candidate.prediction)})"
        for number, each in enumerate(cheapest_changes(job, config, machines, constants), 1)
    ]
    instead = f"it would with {', '.join(remedies)}" if remedies else "nothing that could be tried makes it"
    raise ClusterError(f"{job.name} on {machines} {said}; {instead}; --force trains it all the same")


def predicted(home: Path) -> dict[str, Any] | None:
    """Return what was predicted of a run, in the terms of its report; None where nothing was.

    Args:
        home: The run's folder.
    """
    try:
        found = json.loads((home / PLAN).read_text(encoding="utf-8"))
    except OSError:
        return None
    names = (
        "memory_peak_bytes",
        "memory_peak_bytes_range",
        "step_seconds",
        "tgs",
        "tflops_model",
        "mfu",
        "calibrated",
    )
    return {name: found[name] for name in names}


def _machines(job: JobSpec, device: Literal["cuda", "cpu"]) -> Machines:
    """Return the nodes that the job is spread over, all taken to be like the one that offers least."""
    nodes, workers = session.live_nodes(), job.parallel.workers
    if device == "cuda":
        each = max(int(node.gpus) for node in nodes)
        return Machines(-(-workers // each), min(each, workers), _gpu())
    places = {node.address: int(node.cpus) // job.parallel.cpus_per_worker for node in nodes}
    each = min(workers, max(places.values()))
    memory = min(node.memory_bytes for node in nodes if places[node.address] >= 1)
    known = hardware.device("cpu").model_dump()
    gib = memory / each / _GIB
    return Machines(-(-workers // each), each, Device(**{**known, "memory_gib": gib, "host_memory_gib": gib}))


def _gpu() -> Device:
    """Return the cluster's GPU: of the catalogue, or one with the memory that CUDA sees."""
    name, size = ray.get(ray.remote(num_gpus=1)(_look_at_gpu).remote())
    known = hardware.match(name)
    return known or Device(name=name, memory_gib=size / _GIB, source="CUDA on this cluster")


def _look_at_gpu() -> tuple[str, int]:
    import torch

    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
