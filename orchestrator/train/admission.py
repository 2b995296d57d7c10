"""Admission: predicts memory and step time of a job on this cluster, and rejects jobs that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import ray
from transformers import PretrainedConfig

from orchestrator.atomic_files import JsonObject, read_lines, write_json
from orchestrator.cluster import hardware
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.cluster.hardware import Device
from orchestrator.config.auto_values import DeviceType
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.planner.calibration_store import (
    cpu_rates,
    load_calibration,
    observed,
    remember,
    software_stack_of,
)
from orchestrator.planner.cpu_benchmark import cpu_device, measure
from orchestrator.planner.estimate import TIME_RANGE, CalibrationParams, Prediction
from orchestrator.planner.feasibility import cpu_worker_slots, gpu_cluster, refusal
from orchestrator.planner.formatting import format_prediction
from orchestrator.planner.search import predict_job
from orchestrator.planner.step_time import MissingDeviceRates, micro_steps
from orchestrator.planner.workload import UNKNOWN_DATA, DataShape, Model
from orchestrator.run.recorder import STEPS, Status
from orchestrator.run.report import PLAN, predicted
from orchestrator.train import ray_session

_logger = logging.getLogger(__name__)
WARM_UP_STEPS = 2
"""Steps excluded from measurement: kernels are selected and buffers allocated in them."""
FIRST_STEPS = 5
"""Steps measured after the warm-up steps."""
_GIB = 2**30


@dataclass(frozen=True)
class Admission:
    """A job with the cluster and data that it is predicted for.

    Attributes:
        job: The job.
        config: The model's config.json.
        cluster: The nodes and devices that the job uses.
        stack: The software stack, which selects the calibration.
        data: Statistics of the data.
    """

    job: JobSpec
    config: Mapping[str, object]
    cluster: ClusterSpec
    stack: str
    data: DataShape = UNKNOWN_DATA

    def prediction(self, calibration: CalibrationParams) -> Prediction:
        """Return the prediction with given calibration parameters."""
        return predict_job(self.job, self.config, self.cluster, calibration, self.data).prediction

    def keep(self, run_dir: Path) -> Prediction:
        """Write plan.json to the run directory and return the prediction."""
        found = self.prediction(load_calibration(self.stack, str(run_dir)))
        settings = predict_job(self.job, self.config, self.cluster).settings
        kept = {"machines": str(self.cluster), "stack": self.stack, "settings": settings, **found.as_json()}
        write_json(run_dir / PLAN, kept)
        return found

    def with_data(self, run_dir: Path, packing: JsonObject) -> Admission:
        """Return the admission with statistics of the packed data, and update plan.json.

        Args:
            run_dir: The run directory.
            packing: From `orchestrator.run.report.packing_figures`.
        """
        data = DataShape(
            document_tokens=packing["mean_square_tokens"],
            labelled_share=packing["labelled_share"],
            largest_labelled_share=packing["largest_labelled_share"],
            pack_tokens=0.0 if self.job.data.pads_packs else packing["slots"] / packing["packs"],
        )
        known = replace(self, data=data)
        known.keep(run_dir)
        return known

    def remember(self, run_dir: Path, measured: Mapping[str, object]) -> None:
        """Store measurements of a run, so that later predictions for its software stack are calibrated.

        Args:
            run_dir: The run directory; later measurements of a run replace earlier ones.
            measured: Its report.json, or the same fields after its first steps.
        """
        plain = self.prediction(CalibrationParams())
        try:
            steps = micro_steps(plain.work.at_mean_length(), self.cluster.device)
        except MissingDeviceRates:
            steps = None
        remember(observed(str(run_dir), self.stack, plain, steps, measured))


class FirstStepsCheck:
    """Compares the first steps of a run with its prediction, and stores them for calibration.

    Other jobs thus benefit from a long run while it is running, and a slow run is reported within minutes.

    Args:
        admission: The admission with its prediction.
        run_dir: The run directory.
    """

    def __init__(self, admission: Admission, run_dir: Path) -> None:
        self._admission, self._run_dir = admission, run_dir
        self._done = False

    def __call__(self, status: Status) -> None:
        """Compare once enough steps of the attempt are done."""
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
        self._admission.remember(
            self._run_dir, {"memory_reserved_peak_bytes": held, "medians": {"step_seconds": seconds}}
        )
        if expected:
            _logger.info(first_steps_text(len(rows), seconds, held, expected))


def first_steps_text(count: int, seconds: float, held_bytes: float, expected: JsonObject) -> str:
    """Return measured and predicted step time and memory, with a warning if steps are too slow.

    Args:
        count: Number of steps.
        seconds: Median step time.
        held_bytes: Reserved memory of the worker with the most.
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
    job: JobSpec, device: DeviceType, config: PretrainedConfig, run_dir: Path, force: bool
) -> Admission | None:
    """Predict memory and step time of a job, write plan.json, and reject a job that does not fit.

    Args:
        job: The job.
        device: Device type.
        config: Configuration of its model.
        run_dir: The run directory.
        force: Train even if the job is predicted not to fit.

    Returns:
        The admission; None for an unsupported model architecture, and on nodes that report no memory.

    Raises:
        ClusterError: The job does not fit and force is False; suggests changes.
    """
    sizes = config.get_text_config().to_dict()
    if Model.from_config(sizes) is None:
        _logger.info(f"not planned: the architecture {sizes.get('model_type')!r} is not supported")
        return None
    cluster = _cluster(job, device)
    if cluster is None:
        _logger.info("not planned: the nodes do not report their memory")
        return None
    stack = software_stack_of(predict_job(job, sizes, cluster).prediction.work, cluster)
    admission = Admission(job, sizes, cluster, stack)
    prediction = admission.keep(run_dir)
    fits = prediction.verdict != "does not fit"
    if not fits and not force:
        raise ClusterError(refusal(job, sizes, cluster, prediction, load_calibration(stack, str(run_dir))))
    _logger.info(f"planned{'' if fits else ', and forced'}: {format_prediction(prediction)}")
    return admission


def _cluster(job: JobSpec, device: DeviceType) -> ClusterSpec | None:
    """Return the nodes that the job uses, all equal to the smallest; None if they report no memory."""
    nodes, workers = ray_session.live_nodes(), job.parallel.workers
    if device == "cuda":
        return gpu_cluster(job, nodes, _gpu())
    slots = cpu_worker_slots(job, nodes)
    if slots is None:
        return None
    per_node, memory = slots
    rates = cpu_rates(per_node, job.parallel.cpus_per_worker, measure)
    return ClusterSpec(-(-workers // per_node), per_node, cpu_device(memory / _GIB, rates))


def _gpu() -> Device:
    """Return the GPU model: from the catalogue, or with the memory that CUDA reports."""
    name, size = ray.get(ray.remote(num_gpus=1)(_gpu_name_and_memory).remote())
    known = hardware.match(name)
    return known or Device(name=name, memory_gib=size / _GIB, source="CUDA on this cluster")


def _gpu_name_and_memory() -> tuple[str, int]:
    import torch

    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
