"""The plan before the spending: what a job will need on this cluster, and a refusal in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import ray

from orchestrator.atomic_files import read_lines, write_json
from orchestrator.cluster import hardware
from orchestrator.cluster.cluster_spec import Machines
from orchestrator.cluster.hardware import Device
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.model.build import load_config
from orchestrator.planner.calibration_store import (
    constants_of,
    observed,
    rates_of_processor,
    remember,
    stack_of,
)
from orchestrator.planner.cpu_benchmark import measure, processor
from orchestrator.planner.estimate import TIME_RANGE, Constants, Prediction
from orchestrator.planner.feasibility import gpu_machines, processor_places, refusal
from orchestrator.planner.formatting import figures
from orchestrator.planner.search import asked_of
from orchestrator.planner.step_time import NoPeak, micro_steps
from orchestrator.planner.workload import UNREAD, DataShape, Model
from orchestrator.run.recorder import STEPS, Status
from orchestrator.run.report import PLAN, predicted
from orchestrator.train import ray_session

WARM_UP_STEPS = 2
"""Steps that are not measured: kernels are chosen and buffers made in them."""
FIRST_STEPS = 5
"""Steps that are."""
_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a job on this cluster.

    Attributes:
        job: The job.
        config: Its model's config.json.
        machines: The nodes it is spread over.
        stack: What its constants belong to.
        data: What is known of the data.
    """

    job: JobSpec
    config: Mapping[str, Any]
    machines: Machines
    stack: str
    data: DataShape = UNREAD

    def prediction(self, constants: Constants) -> Prediction:
        """Return the prediction by constants of a stack."""
        return asked_of(self.job, self.config, self.machines, constants, self.data).prediction

    def keep(self, run_dir: Path) -> Prediction:
        """Write plan.json into the run's folder, and return what it says."""
        found = self.prediction(constants_of(self.stack, str(run_dir)))
        settings = asked_of(self.job, self.config, self.machines).settings
        kept = {"machines": str(self.machines), "stack": self.stack, "settings": settings, **found.as_json()}
        write_json(run_dir / PLAN, kept)
        return found

    def with_data(self, run_dir: Path, packing: Mapping[str, Any]) -> Forecast:
        """Return the same for data that have been read and packed, and keep what is predicted for them.

        Args:
            run_dir: The run's folder.
            packing: From `orchestrator.run.report.packing_figures`.
        """
        data = DataShape(
            document_tokens=packing["mean_square_tokens"],
            labelled_share=packing["labelled_share"],
            largest_labelled_share=packing["largest_labelled_share"],
        )
        known = replace(self, data=data)
        known.keep(run_dir)
        return known

    def remember(self, run_dir: Path, measured: Mapping[str, Any]) -> None:
        """Keep what a run measured, so that later plans of its stack are calibrated.

        Args:
            run_dir: The run's folder; what is measured later replaces what it measured before.
            measured: Its report, or as much of one as its first steps give.
        """
        plain = self.prediction(Constants())
        try:
            steps = micro_steps(plain.work, self.machines.device)
        except NoPeak:
            steps = None
        remember(observed(str(run_dir), self.stack, plain, steps, measured))


class FirstSteps:
    """Holds a prediction against a run's first steps as soon as they are made, and calibrates by them.

    A run that takes days so helps the plans of all that is started beside it, and one that is slower than it
    should be is told of within minutes.

    Args:
        forecast: What was predicted.
        run_dir: The run's folder.
        note: Told what was measured.
    """

    def __init__(self, forecast: Forecast, run_dir: Path, note: Callable[[str], None]) -> None:
        self._forecast, self._run_dir, self._note = forecast, run_dir, note
        self._done = False

    def __call__(self, status: Status) -> None:
        """Look whether enough steps of the attempt are made."""
        if not self._done and status.step - status.start >= WARM_UP_STEPS + FIRST_STEPS:
            self._take(status.attempt)

    def _take(self, attempt: int) -> None:
        rows = [row for row in read_lines(self._run_dir / STEPS) if row["attempt"] == attempt]
        rows = rows[WARM_UP_STEPS:]
        if not rows:
            return
        self._done = True
        seconds = median(row["step_seconds"] for row in rows)
        held = max(row["memory_reserved_peak_bytes"] for row in rows)
        expected = predicted(self._run_dir)
        self._forecast.remember(
            self._run_dir, {"memory_reserved_peak_bytes": held, "medians": {"step_seconds": seconds}}
        )
        if expected:
            self._note(first_steps_text(len(rows), seconds, held, expected))


def first_steps_text(count: int, seconds: float, held_bytes: float, expected: Mapping[str, Any]) -> str:
    """Return what first steps measured beside what was predicted, and what lies outside its range.

    Args:
        count: How many steps.
        seconds: Of the median step.
        held_bytes: By the fullest worker.
        expected: From `predicted`.
    """
    usual, held = expected["step_seconds"], expected["memory_reserved_peak_bytes"] / _GIB
    time = f"{seconds:.3g} s a step" + (f" ({usual:.3g} predicted)" if usual else "")
    said = f"the {count} steps after the first {WARM_UP_STEPS}: {time}, "
    said += f"{held_bytes / _GIB:.2f} GiB held ({held:.2f} predicted)"
    if usual and seconds > usual * (1 + TIME_RANGE[expected["calibrated"]]):
        said += f"; that is slower than the range that was predicted, whose seconds by part are in {PLAN}"
    return said


def require_fit(
    job: JobSpec, device: Literal["cuda", "cpu"], run_dir: Path, force: bool, note: Callable[[str], None]
) -> Forecast | None:
    """Predict what a job needs and takes, keep that as plan.json, and refuse what cannot fit.

    Args:
        job: The job.
        device: What it runs on.
        run_dir: The run's folder.
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
    found = forecast.keep(run_dir)
    said = figures(found)
    if found.verdict != "does not fit" or force:
        note(f"planned{', and forced' if found.verdict == 'does not fit' else ''}: {said}")
        return forecast
    raise ClusterError(refusal(job, config, machines, found, constants_of(stack, str(run_dir))))


def _machines(job: JobSpec, device: Literal["cuda", "cpu"]) -> Machines | None:
    """Return the nodes that the job is spread over, all like the one that offers least; None if none says."""
    nodes, workers = ray_session.live_nodes(), job.parallel.workers
    if device == "cuda":
        return gpu_machines(job, nodes, _gpu())
    places = processor_places(job, nodes)
    if places is None:
        return None
    each, memory = places
    rates = rates_of_processor(each, job.parallel.cpus_per_worker, measure)
    return Machines(-(-workers // each), each, processor(memory / _GIB, rates))


def _gpu() -> Device:
    """Return the cluster's GPU: of the catalogue, or one with the memory that CUDA sees."""
    name, size = ray.get(ray.remote(num_gpus=1)(_look_at_gpu).remote())
    known = hardware.match(name)
    return known or Device(name=name, memory_gib=size / _GIB, source="CUDA on this cluster")


def _look_at_gpu() -> tuple[str, int]:
    import torch

    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
