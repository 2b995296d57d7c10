"""The driver: one path from a job to a finished run, on a laptop and on a cluster.

    resolve -> admission -> data -> fit -> export -> report

Each stage is a function of the `ResolvedJob`; workers get a `WorkerConfig`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.atomic_files import JsonObject, write_json
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.retention import retention_of
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError
from orchestrator.export.export import ExportResult
from orchestrator.export.run_exports import export_finished
from orchestrator.metrics.exporter import require_port
from orchestrator.metrics.trackers import require_packages
from orchestrator.model.base_model_id import identity
from orchestrator.model.build import load_config
from orchestrator.model.compatibility import model_notes
from orchestrator.run import run_dir
from orchestrator.run.recorder import REPORT
from orchestrator.run.recorder_handle import RecorderHandle
from orchestrator.run.report import report as summarize
from orchestrator.run.resolve import ResolvedJob, format_gib, offload_reason, resolve
from orchestrator.run.run_lock import RunLock
from orchestrator.run.run_log import driver_log
from orchestrator.run.worker_config import CHECKPOINTS, BenchmarkRun, WorkerConfig
from orchestrator.train import admission, environment, ray_session, resources, resume
from orchestrator.train.fit import OnProgress, fit, start_recorder
from orchestrator.train.prepare_data import PreparedData, prepare_data
from orchestrator.train.ray_session import get_result

_logger = logging.getLogger(__name__)


@dataclass
class _Start:
    """One start of a run.

    Attributes:
        run_dir: The run directory.
        lock: This driver's lock on it.
        on_progress: Called about twice a second while workers run.
        benchmark: Set for a run that only measures: it saves and exports nothing.
        force: Train although the plan says that the job cannot fit.
        seconds: Wall time of each stage so far.
    """

    run_dir: Path
    lock: RunLock
    on_progress: OnProgress
    benchmark: BenchmarkRun | None
    force: bool
    began: float
    seconds: dict[str, float] = field(default_factory=dict)

    def end_stage(self, name: str) -> None:
        """Record the time since the last stage ended."""
        now = time.monotonic()
        self.seconds[name] = now - self.began
        self.began = now


def run(
    job: JobSpec,
    address: str | None,
    on_progress: OnProgress,
    benchmark: BenchmarkRun | None = None,
    force: bool = False,
) -> JsonObject:
    """Train a job, or resume its run, to the end.

    Args:
        job: The job.
        address: Address of a Ray cluster; None starts a local Ray and ends it afterwards.
        on_progress: Called with the status about twice a second while workers run.
        benchmark: Set for a run that only measures: it saves and exports nothing, and is started whatever the
            plan says.
        force: Train although the plan says that the job cannot fit.

    Returns:
        The run's report, also written to report.json.

    Raises:
        OrchestratorError: The subclass says whether the job file, the cluster or the run failed.
    """
    began = time.monotonic()
    job = run_dir.with_absolute_paths(environment.apply_job_env(job))
    run_dir.require_inputs(job)
    created = run_dir.missing_directories(Path(job.checkpoint.storage) / job.name)
    directory = run_dir.open_run(job, workers_here=address is None)
    finished = resume.finished_report(job, directory)
    if finished is not None:
        return finished
    lock = RunLock.acquire(directory)
    try:
        with driver_log(directory):
            require_port(job.metrics.host, job.metrics.port)
            require_packages(job.metrics.trackers)
            with ray_session.connected(address, job.run.env):
                return _train(job, _Start(directory, lock, on_progress, benchmark, force, began))
    except (SpecError, ClusterError):
        run_dir.discard_refused_run(directory, created)
        raise
    finally:
        run_dir.remove_ray_marker(directory)
        lock.release(directory)


def prepare(job: JobSpec, address: str | None) -> JsonObject:
    """Tokenize and pack only.

    Args:
        job: The job.
        address: Address of a Ray cluster; None starts a local Ray and ends it afterwards.

    Returns:
        Rows, tokens and packs, as `pack --json` prints them.
    """
    job = run_dir.with_absolute_paths(environment.apply_job_env(job))
    run_dir.require_inputs(job)
    created = run_dir.missing_directories(Path(job.checkpoint.storage) / run_dir.CACHE)
    try:
        with ray_session.connected(address, job.run.env):
            return prepare_data(job, load_config(job.model)).figures
    except (SpecError, ClusterError):
        run_dir.remove_empty(created)
        raise


def _train(job: JobSpec, start: _Start) -> JsonObject:
    resumes = bool(checkpoint_dir.published(start.run_dir / CHECKPOINTS))
    resolved = resolve(job, ray_session.live_nodes(), reads_weights=not resumes)
    admitted = _admit(resolved, start)
    start.end_stage("start")

    data = prepare_data(job, resolved.model_config)
    run_dir.require_same_data(start.run_dir, data.training, data.evaluation, resume.input_files(job))
    finished = resume.require_steps_to_go(job, start.run_dir, data.figures["packs"])
    if finished is not None:
        return finished
    if admitted:
        admitted = admitted.with_data(start.run_dir, data.figures)
    start.end_stage("data")

    recorder = _open_records(resolved, start)
    watches = [admission.FirstStepsCheck(admitted, start.run_dir)] if admitted else []
    fit(_worker_config(resolved, data, start), recorder, [start.on_progress, *watches])
    start.end_stage("training")

    exported = None
    if start.benchmark is None:
        exported = export_finished(start.run_dir, job, resolved.dtype)
    start.end_stage("export")
    return _report(resolved, start, data, exported, recorder, admitted)


def _admit(resolved: ResolvedJob, start: _Start) -> admission.Admission | None:
    """Say what the job will run with, wait for free resources, and refuse a job that cannot fit.

    Raises:
        SpecError: The base model is not the one that the adapters of this run were trained with.
        ClusterError: Resources are in use, or the plan says that the job does not fit.
    """
    job = resolved.job
    for line in (
        *model_notes(job.model, resolved.model_config, job.data.max_length),
        *_sequence_parallel_notes(resolved),
        *_host_memory_notes(resolved),
    ):
        _logger.info(line)
    if job.method.type == "lora":
        run_dir.require_same_base(start.run_dir, identity(job))
    resources.wait_for_resources(resolved)
    is_forced = start.force or start.benchmark is not None
    return admission.require_fit(job, resolved.device, resolved.model_config, start.run_dir, is_forced)


def _sequence_parallel_notes(resolved: ResolvedJob) -> list[str]:
    """Return a line if sequence parallel groups cross nodes."""
    parallel = resolved.job.parallel
    size, cpus = parallel.sequence_parallel_size, parallel.cpus_per_worker
    nodes = ray_session.live_nodes()
    slots = [int(node.gpus if resolved.gpus_per_worker else node.cpus // cpus) for node in nodes]
    crossing = [count for count in slots if count % size]
    if len(slots) < 2 or not crossing:
        return []
    return [
        f"sequence_parallel_size={size} does not divide the {max(crossing)} worker slots of a node: workers "
        "that share a sequence may be on different nodes, where all-to-all is slower"
    ]


def _host_memory_notes(resolved: ResolvedJob) -> list[str]:
    """Return a line on the host memory that workers reserve, or that it cannot be known."""
    job, parallel = resolved.job, resolved.job.parallel
    if parallel.offload_optimizer == parallel.offload_param == "none":
        return []
    if resolved.host_memory is None or resolved.parameter_count is None:
        return [
            f"model.path={job.model.path}: parameters cannot be counted before workers start, so no host "
            "memory is reserved for offload"
        ]
    reason = offload_reason(job, resolved.parameter_count, resolved.host_memory)
    size = format_gib(resolved.host_memory.total)
    return [f"each worker reserves {size} of host memory: {reason}"]


def _open_records(resolved: ResolvedJob, start: _Start) -> RecorderHandle:
    """Write job.yaml and deepspeed.json, remove unfinished checkpoints, and start the recorder."""
    job = resolved.job
    run_dir.record_job(start.run_dir, job)
    write_json(start.run_dir / "deepspeed.json", resolved.deepspeed_config)
    checkpoint_dir.clean(start.run_dir / CHECKPOINTS, retention_of(job.checkpoint, start.run_dir))
    return start_recorder(job, start.run_dir, start.lock)


def _worker_config(resolved: ResolvedJob, data: PreparedData, start: _Start) -> WorkerConfig:
    return WorkerConfig(
        job=resolved.job,
        run_dir=start.run_dir,
        training=data.training,
        evaluation=data.evaluation,
        dtype=resolved.dtype,
        device=resolved.device,
        deepspeed_config=resolved.deepspeed_config,
        worker_resources=resolved.worker_resources,
        nvme_bytes=resolved.nvme_bytes,
        benchmark=start.benchmark,
    )


def _report(
    resolved: ResolvedJob,
    start: _Start,
    data: PreparedData,
    exported: ExportResult | None,
    recorder: RecorderHandle,
    admitted: admission.Admission | None,
) -> JsonObject:
    """Write report.json, keep what was measured for later plans, and close the records."""
    start.seconds["checkpoints"] = get_result(recorder.checkpoint_seconds.remote())
    report = summarize(resolved.job, start.run_dir, data.figures, start.seconds)
    if exported is not None:
        report["export"] = str(exported.path)
    write_json(start.run_dir / REPORT, report)
    if admitted:
        admitted.remember(start.run_dir, report)
    get_result(recorder.end_run.remote("finished"))
    get_result(recorder.close.remote())
    return report
