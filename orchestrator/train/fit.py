"""The worker group: the recorder, Ray Train in a thread, and the driver's view of both."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import shutdown
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.metrics.trackers import Trackers
from orchestrator.run.failures import last_line, worker_group_error
from orchestrator.run.recorder import Recorder, Status
from orchestrator.run.recorder_handle import RecorderHandle
from orchestrator.run.run_lock import RunLock
from orchestrator.run.run_log import LOGS
from orchestrator.run.worker_config import WorkerConfig
from orchestrator.train.graceful_stop import stop_run
from orchestrator.train.ray_session import get_result
from orchestrator.train.suggestions import node_memory_suggestions

OnProgress = Callable[[Status], None]
_POLL_SECONDS = 0.5


def start_recorder(job: JobSpec, directory: Path, lock: RunLock) -> RecorderHandle:
    """Start the recorder as an actor on the driver's node, and wait until it answers.

    Raises:
        ClusterError: It cannot start, such as for a metrics port that another process has.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    trackers = partial(
        Trackers, job.metrics.trackers, job.name, job.metrics.project, directory, job.model_dump(mode="json")
    )
    actor = ray.remote(Recorder).options(**options)
    started = actor.remote(directory, job.name, lock, job.metrics.host, job.metrics.port, trackers)
    recorder = cast(RecorderHandle, started)
    try:
        get_result(recorder.status.remote())
    except ray.exceptions.RayActorError as error:
        raise ClusterError(
            f"the recorder cannot be started ({last_line(error)}); check metrics.port"
        ) from None
    return recorder


def fit(config: WorkerConfig, recorder: RecorderHandle, on_progress: Sequence[OnProgress]) -> None:
    """Run the worker group to its end.

    Args:
        config: Handed to every worker.
        recorder: The actor that `start_recorder` returned.
        on_progress: Each is called with the status about twice a second.

    Raises:
        OrchestratorError: The run failed, and retrying cannot help or was tried `run.max_failures` times.
        Stopped: This process was told to end; the workers saved if `run.stop_grace_seconds` allowed it.
    """
    outcome: dict[str, BaseException] = {}
    thread = threading.Thread(target=_fit_in_thread, args=(config, recorder, outcome), daemon=True)

    def show(status: Status) -> None:
        for callback in on_progress:
            callback(status)

    run = config.job.run
    grace = run.stop_grace_seconds if config.benchmark is None else 0  # a benchmark run saves nothing
    with shutdown.deferred(grace) as stop_requested:
        thread.start()
        while thread.is_alive() and not stop_requested.is_set():
            thread.join(timeout=_POLL_SECONDS)
            status = get_result(recorder.status.remote())
            show(status)
            if status.fatal is not None and not stop_requested.is_set():
                raise status.fatal
    if shutdown.received():
        raise stop_run(recorder, thread, config.checkpoints, grace, show)
    if "error" in outcome:
        reported = get_result(recorder.failures.remote())
        suggestions = node_memory_suggestions(config.job, config.device)
        raise worker_group_error(
            outcome["error"], reported, run.max_failures, config.run_dir / LOGS, suggestions
        )


def _fit_in_thread(config: WorkerConfig, recorder: RecorderHandle, outcome: dict[str, BaseException]) -> None:
    """Run Ray Train outside the main thread, so that Ctrl-C reaches the driver itself."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.train.callbacks import AttemptWatch
    from orchestrator.train.worker import run_worker

    job = config.job
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"config": config, "recorder": recorder},
        scaling_config=ScalingConfig(
            num_workers=job.parallel.workers,
            use_gpu=config.device == "cuda",
            resources_per_worker=config.worker_resources,
        ),
        torch_config=TorchConfig(timeout_s=job.run.collective_timeout_seconds),
        run_config=RunConfig(
            name=job.name,
            storage_path=job.checkpoint.storage,
            worker_runtime_env={"env_vars": config.worker_environment(os.environ)},
            failure_config=FailureConfig(max_failures=job.run.max_failures, controller_failure_limit=10),
            # Ray would remove whole folders, with whatever else is in them; `checkpoint_dir.retain` does not.
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[AttemptWatch(recorder)],
        ),
    )
    try:
        trainer.fit()
    except BaseException as error:  # the main thread raises it
        outcome["error"] = error
