"""The driver: one path from a job to a finished run, on a laptop and on a cluster.

    check the cluster -> lay out the run's folder -> tokenise and pack on CPUs -> place the workers -> watch
    -> export -> report

Everything that can be decided is decided here, once; workers are handed a `Brief`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import shutdown
from orchestrator.atomic_files import write_json
from orchestrator.checkpoint import checkpointer
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.token_cache import TokenStore
from orchestrator.data.tokenize import Note, tokenize_sources
from orchestrator.engine.optimizers import require_bitsandbytes
from orchestrator.errors import ClusterError, OrchestratorError, SpecError
from orchestrator.export.run_exports import export_finished
from orchestrator.metrics.exporter import require_port
from orchestrator.metrics.trackers import Trackers, require_packages
from orchestrator.model.base_model_id import identity
from orchestrator.model.build import load_config, require_supported
from orchestrator.model.compatibility import model_notes
from orchestrator.parallel.deepspeed_config import fit_buffers, render
from orchestrator.parallel.parallel_dims import sequence_parallel_problem
from orchestrator.planner.host_memory import disk_bytes
from orchestrator.run import run_dir
from orchestrator.run.failures import last_line, worker_group_error
from orchestrator.run.recorder import REPORT, Recorder, Status
from orchestrator.run.report import packing_figures
from orchestrator.run.report import report as summarise
from orchestrator.run.run_lock import RunLock
from orchestrator.run.run_log import LOGS, driver_log
from orchestrator.run.worker_config import CHECKPOINTS, Brief, Trial
from orchestrator.train import admission, environment, ray_session, resources, resume, vocabulary
from orchestrator.train.graceful_stop import stop_run
from orchestrator.train.suggestions import node_memory_remedies

Watch = Callable[[Status], None]
_POLL_SECONDS = 0.5


def run(
    job: JobSpec,
    address: str | None,
    watch: Watch,
    note: Note,
    trial: Trial | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Train a job from wherever its run stands to the end.

    Args:
        job: The job.
        address: Address of a Ray cluster; None starts a local Ray and ends it afterwards.
        watch: Called about twice a second while workers run.
        note: Told in a sentence what happens before that.
        trial: Given for a run for its figures only, which saves and exports nothing, and is tried whatever it
            is predicted to need.
        force: Train although the plan says that it cannot fit.

    Returns:
        The run's report, also written to report.json.

    Raises:
        OrchestratorError: What went wrong, by whose side it was.
    """
    started = time.monotonic()
    job = run_dir.with_absolute_paths(environment.adopt(job))
    run_dir.require_inputs(job)
    made = run_dir.missing_directories(Path(job.checkpoint.storage) / job.name)
    home = run_dir.open_run(job, workers_here=address is None)
    finished = resume.finished_report(job, home, note)
    if finished is not None:
        return finished
    run_lock = RunLock.acquire(home)
    try:
        with driver_log(home):
            require_port(job.metrics.host, job.metrics.port)
            with ray_session.connected(address, job.run.env):
                device = resources.place(job)
                run_dir.resolve_dtype(job, device)  # refuses what the device cannot do
                return _train(job, device, home, run_lock, (watch, note), started, trial, force)
    except (SpecError, ClusterError):
        run_dir.discard_refused_run(home, made)
        raise
    finally:
        run_dir.remove_ray_marker(home)
        run_lock.release(home)


def _train(
    job: JobSpec,
    device: Literal["cuda", "cpu"],
    home: Path,
    run_lock: RunLock,
    tell: tuple[Watch, Note],
    started: float,
    trial: Trial | None = None,
    force: bool = False,
) -> dict[str, Any]:
    watch, note = tell
    require_bitsandbytes(job.optim.optimizer)
    require_packages(job.metrics.trackers)
    resumes = bool(checkpointer.published(home / CHECKPOINTS))
    count = require_supported(job, reads_weights=not resumes)
    for line in model_notes(job.model, load_config(job.model), job.data.max_length):
        note(line)
    if job.method.type == "lora":
        run_dir.require_same_base(home, identity(job))
    _require_shareable(job, device, note)
    dtype = run_dir.resolve_dtype(job, device)
    ds_config = render(job, dtype, device)
    if count is not None:
        fit_buffers(ds_config, -(-count.largest // job.parallel.workers))
    memory = resources.reserve_host_memory(job, device, ds_config, count, note)
    planned = admission.require_fit(job, device, home, force or trial is not None, note)
    begun = time.monotonic()
    training, held_out, packing = _prepare_data(job, note)
    run_dir.require_same_data(home, training, held_out, resume.input_files(job))
    finished = resume.require_steps_to_go(job, home, packing["packs"], note)
    if finished is not None:
        return finished
    run_dir.record_job(home, job)
    if planned:
        planned = planned.with_data(home, packing)
    prepared = time.monotonic()
    on_disk = disk_bytes(ds_config, count, job.parallel.workers) if count is not None else 0
    brief = Brief(job, home, training, held_out, dtype, device, ds_config, memory, on_disk, trial)
    write_json(home / "deepspeed.json", brief.ds_config)
    checkpointer.clean(brief.checkpoints, job.checkpoint.keep)
    recorder = _start_recorder(job, home, run_lock)
    watches: list[Watch] = [watch]
    if planned:
        watches.append(admission.FirstSteps(planned, home, note))
    _fit(brief, recorder, watches)
    trained = time.monotonic()
    exported = export_finished(home, job, dtype, note) if trial is None else None
    ended = time.monotonic()
    seconds = {
        "start": begun - started,
        "data": prepared - begun,
        "training": trained - prepared,
        "checkpoints": _get(recorder.checkpoint_seconds.remote()),
        "export": ended - trained,
    }
    report = summarise(job, home, packing, seconds)
    if exported is not None:
        report["export"] = str(exported.path)
    write_json(home / REPORT, report)
    if planned:
        planned.remember(home, report)
    _get(recorder.ended.remote("finished"))
    _get(recorder.close.remote())
    return report


def prepare(job: JobSpec, address: str | None, note: Note) -> dict[str, Any]:
    """Tokenise and pack only.

    Args:
        job: The job.
        address: Address of a Ray cluster; None starts a local Ray and ends it afterwards.
        note: Told in a sentence how far it is.

    Returns:
        What became of the rows and how full the packs are.
    """
    job = run_dir.with_absolute_paths(environment.adopt(job))
    run_dir.require_inputs(job)
    made = run_dir.missing_directories(Path(job.checkpoint.storage) / run_dir.CACHE)
    try:
        with ray_session.connected(address, job.run.env):
            return _prepare_data(job, note)[2]
    except (SpecError, ClusterError):
        run_dir.remove_empty(made)
        raise


def _require_shareable(job: JobSpec, device: Literal["cuda", "cpu"], note: Note) -> None:
    """Refuse sequence parallelism that the model's heads do not allow; say where it will cross nodes."""
    size = job.parallel.sequence_parallel_size
    if size == 1:
        return
    config = load_config(job.model).get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    problem = sequence_parallel_problem(size, heads, kv_heads)
    if problem:
        raise SpecError(problem)
    cpus = job.parallel.cpus_per_worker
    places = [int(node.gpus if device == "cuda" else node.cpus // cpus) for node in ray_session.live_nodes()]
    crossing = [count for count in places if count % size]
    if len(places) > 1 and crossing:
        note(
            f"sequence_parallel_size={size} does not divide the {max(crossing)} workers that a node takes: "
            "workers that share a sequence may exchange it between nodes, which is slower than inside one"
        )


def _prepare_data(job: JobSpec, note: Note) -> tuple[Path, Path | None, dict[str, Any]]:
    """Tokenise and pack, before any device is held.

    Returns:
        The plan of the training data, that of the held-out data, and what became of the rows.
    """
    cache = Path(job.checkpoint.storage) / run_dir.CACHE
    training, figures = _plan(job, job.data.train, cache, note)
    held_out = _plan(job, job.eval.data, cache, note)[0] if job.eval else None
    for line in vocabulary.notes(job):
        note(line)
    return training, held_out, figures


def _plan(
    job: JobSpec, sources: Sequence[SourceSpec], cache: Path, note: Note
) -> tuple[Path, dict[str, Any]]:
    stores = tokenize_sources(job.model, job.data, sources, cache, note)
    vocabulary.require_embedded(job, sources, stores)
    result: tuple[Path, dict[str, Any]] = _get(
        _make_plan.remote(job, sources, cache, [store.folder for store in stores])
    )
    return result


@ray.remote(num_cpus=1)
def _make_plan(
    job: JobSpec, sources: Sequence[SourceSpec], cache: Path, stores: Sequence[Path]
) -> tuple[Path, dict[str, Any]]:
    opened = [TokenStore(folder) for folder in stores]
    folder = packed_dataset.plan_in(cache, opened, sources, job.data, job.run.seed)
    is_training = tuple(sources) == job.data.train
    return folder, packing_figures(job, *packed_dataset.load(folder)) if is_training else {}


def _start_recorder(job: JobSpec, home: Path, run_lock: RunLock) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    recorder = (
        ray.remote(Recorder)
        .options(**options)
        .remote(home, job.name, run_lock, job.metrics.host, job.metrics.port, _trackers(job, home))
    )
    try:
        _get(recorder.status.remote())
    except ray.exceptions.RayActorError as error:
        raise ClusterError(f"the recorder cannot be started ({last_line(error)}); see metrics.port") from None
    return recorder


def _trackers(job: JobSpec, home: Path) -> Callable[[Note], Trackers]:
    return partial(
        Trackers, job.metrics.trackers, job.name, job.metrics.project, home, job.model_dump(mode="json")
    )


def _fit(brief: Brief, recorder: Any, watches: Sequence[Watch]) -> None:
    """Run the worker group to its end, and show where it stands to all who watch.

    Raises:
        OrchestratorError: It failed for good.
        Stopped: This process was told to end; as much was saved as its grace allowed.
    """
    box: dict[str, BaseException] = {}
    thread = threading.Thread(target=_fit_in_thread, args=(brief, recorder, box), daemon=True)

    def show(status: Status) -> None:
        for watch in watches:
            watch(status)

    run = brief.job.run
    grace = run.stop_grace_seconds if brief.trial is None else 0  # of a trial nothing is saved
    with shutdown.deferred(grace) as told:
        thread.start()
        while thread.is_alive() and not told.is_set():
            thread.join(timeout=_POLL_SECONDS)
            status: Status = _get(recorder.status.remote())
            show(status)
            if status.fatal is not None and not told.is_set():
                raise status.fatal
    if shutdown.received():
        raise stop_run(recorder, thread, brief.checkpoints, grace, show)
    if "error" in box:
        reported = _get(recorder.failures.remote())
        remedies = node_memory_remedies(brief.job, brief.device)
        raise worker_group_error(box["error"], reported, run.max_failures, brief.folder / LOGS, remedies)


def _fit_in_thread(brief: Brief, recorder: Any, box: dict[str, BaseException]) -> None:
    """Hand the job to Ray Train; outside the main thread, so that Ctrl-C reaches the driver itself."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.train.callbacks import AttemptWatch
    from orchestrator.train.worker import run_worker

    job = brief.job
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"brief": brief, "recorder": recorder},
        scaling_config=ScalingConfig(
            num_workers=job.parallel.workers,
            use_gpu=brief.device == "cuda",
            resources_per_worker=brief.worker_resources,
        ),
        torch_config=TorchConfig(timeout_s=job.run.collective_timeout_seconds),
        run_config=RunConfig(
            name=job.name,
            storage_path=job.checkpoint.storage,
            worker_runtime_env={"env_vars": brief.worker_environment(os.environ)},
            failure_config=FailureConfig(max_failures=job.run.max_failures, controller_failure_limit=10),
            # Ray would remove whole folders, with whatever else is in them; `checkpoint.retain` does not.
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[AttemptWatch(recorder)],
        ),
    )
    try:
        trainer.fit()
    except BaseException as error:  # the main thread raises it
        box["error"] = error


def _get(reference: Any) -> Any:
    """Return a task's result; an error of ours is raised as itself."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise
