"""The plan before the spending: what a job will need on this cluster, and a refusal in time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray

from cluster import hardware
from cluster.hardware import Device
from cluster.machines import Machines
from orchestrator.errors import ClusterError
from orchestrator.model.build import load_config
from orchestrator.plan.planner import asked_of, cheapest_changes
from orchestrator.plan.prediction import Constants, Prediction, predict
from orchestrator.plan.store import constants_of, observed, remember, stack_of
from orchestrator.plan.throughput import micro_steps
from orchestrator.plan.wording import changed, figures
from orchestrator.plan.work import Model
from orchestrator.spec import JobSpec
from orchestrator.train import session

PLAN = "plan.json"
_REPORTED = ("memory_reserved_peak_bytes", "step_seconds", "tgs", "tflops_model", "mfu", "calibrated")
_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a job on this cluster.

    Attributes:
        job: The job.
        config: Its model's config.json.
        machines: The nodes it is spread over.
        stack: What its constants belong to.
        mean_square_tokens: How many tokens a token sees in its document, on average; 0 for the whole pack.
    """

    job: JobSpec
    config: Mapping[str, Any]
    machines: Machines
    stack: str
    mean_square_tokens: float = 0.0

    def prediction(self, constants: Constants) -> Prediction:
        """Return the prediction by constants of a stack."""
        asked = asked_of(self.job, self.config, self.machines, Constants())
        work = replace(asked.prediction.work, mean_square_tokens=self.mean_square_tokens)
        return predict(work, self.machines, constants)

    def keep(self, home: Path) -> Prediction:
        """Write plan.json into the run's folder, and return what it says."""
        found = self.prediction(constants_of(self.stack))
        settings = asked_of(self.job, self.config, self.machines).settings
        kept = {"machines": str(self.machines), "stack": self.stack, "settings": settings, **found.as_json()}
        (home / PLAN).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return found

    def with_documents(self, home: Path, mean_square_tokens: float) -> Forecast:
        """Return the same for documents that have been read, and keep what is predicted for them."""
        if self.job.data.cross_document_attention:
            return self
        known = replace(self, mean_square_tokens=mean_square_tokens)
        known.keep(home)
        return known

    def remember(self, report: Mapping[str, Any]) -> None:
        """Keep what a finished run measured, so that later plans of its stack are calibrated."""
        plain = self.prediction(Constants())
        steps = micro_steps(plain.work, self.machines.device) if plain.time else None
        remember(observed(self.stack, plain, steps, report))


def require_fit(
    job: JobSpec, device: Literal["cuda", "cpu"], home: Path, force: bool, note: Callable[[str], None]
) -> Forecast | None:
    """Predict what a job needs and takes, keep that as plan.json, and refuse what cannot fit.

    Args:
        job: The job.
        device: What it runs on.
        home: The run's folder.
        force: Go on whatever is predicted.
        note: Told what is predicted.

    Returns:
        What is predicted; None for a model of a family that is not known, and on nodes that offer no memory.

    Raises:
        ClusterError: It does not fit, and is not forced; the changes that would help most are named.
    """
    config = load_config(job.model).get_text_config().to_dict()
    if Model.of(config) is None:
        note(f"not planned: the sizes of the family {config.get('model_type')!r} are not known")
        return None
    machines = _machines(job, device)
    if machines is None:
        note("not planned: the nodes do not say how much memory they offer")
        return None
    stack = stack_of(asked_of(job, config, machines).prediction.work, machines)
    forecast = Forecast(job, config, machines, stack)
    found = forecast.keep(home)
    said = figures(found)
    if found.verdict != "does not fit" or force:
        note(f"planned{', and forced' if found.verdict == 'does not fit' else ''}: {said}")
        return forecast
    remedies = [
        f"({number}) {changed(each.changes)} ({figures(each.candidate.prediction)})"
        for number, each in enumerate(cheapest_changes(job, config, machines, constants_of(stack)), 1)
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
    return {name: found[name] for name in _REPORTED}


def _machines(job: JobSpec, device: Literal["cuda", "cpu"]) -> Machines | None:
    """Return the nodes that the job is spread over, all like the one that offers least; None if none says."""
    nodes, workers = session.live_nodes(), job.parallel.workers
    if device == "cuda":
        each = max(int(node.gpus) for node in nodes)
        return Machines(-(-workers // each), min(each, workers), _gpu())
    places = {node.address: int(node.cpus) // job.parallel.cpus_per_worker for node in nodes}
    each = min(workers, max(places.values()))
    memory = min(node.memory_bytes for node in nodes if places[node.address] >= 1)
    if not memory:
        return None
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
