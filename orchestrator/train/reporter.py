"""What a worker reports: steps, evaluations, checkpoints and failures, to the recorder and to Ray Train."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ray
import ray.train
import torch
from torch import distributed as dist

from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.checkpoint.retention import retention_of
from orchestrator.cluster import hardware
from orchestrator.engine.memory_limit import is_out_of_memory
from orchestrator.engine.train_engine import TrainEngine
from orchestrator.errors import MemoryExhaustedError, OrchestratorError
from orchestrator.metrics.meter import RankSteps
from orchestrator.run.failures import Failure
from orchestrator.run.recorder import WorkerInfo
from orchestrator.run.recorder_handle import RecorderHandle
from orchestrator.run.worker_config import WorkerConfig
from orchestrator.train.suggestions import memory_suggestions

if TYPE_CHECKING:
    from orchestrator.train.loop import StepReport

_STOP_POLL_SECONDS = 0.5
_REPORT_TIMEOUT_SECONDS = 30.0
_MAX_PENDING_STEPS = 8
_logger = logging.getLogger(__name__)
T = TypeVar("T")


@contextmanager
def reported_failures(
    config: WorkerConfig, reporter: Reporter, recorder: RecorderHandle, log: Path
) -> Iterator[None]:
    """Log an exception of this rank and report it to the recorder, which decides whether to retry.

    Raises:
        MemoryExhaustedError: In place of the out-of-memory error of torch or of the operating system.
    """
    try:
        yield
    except OrchestratorError as error:
        _logger.exception("this rank failed, and a retry would not help")
        ray.get(recorder.report_fatal.remote(error, reporter.attempt))
        raise
    except Exception as error:
        _logger.exception("this rank failed")
        if isinstance(error, RuntimeError | MemoryError | OSError) and is_out_of_memory(error):
            fatal = MemoryExhaustedError(
                f"rank {dist.get_rank()} ran out of memory ({(str(error) or 'none left').splitlines()[0]}); "
                f"{memory_suggestions(config.job, config.device)}"
            )
            ray.get(recorder.report_fatal.remote(fatal, reporter.attempt))
            raise fatal from error
        failure = Failure.from_exception(error, _group(), dist.get_rank(), reporter.step, str(log))
        try:  # the recorder may be what failed
            ray.get(recorder.report_failure.remote(failure), timeout=_REPORT_TIMEOUT_SECONDS)
        except Exception:
            _logger.exception("the failure could not be reported to the recorder")
        raise
    finally:
        reporter.close()


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def step_message(report: StepReport) -> tuple[dict[str, float], RankSteps]:
    """Return the arguments of `Recorder.record_step` for a finished step, without the attempt."""
    values = {
        "step": report.step,
        "epoch": report.epoch,
        "seconds": report.seconds,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "skipped": report.skipped,
    }
    return values, report.ranks


class Reporter:
    """The callback of the training loop: rank 0 reports to the recorder, every rank to Ray Train."""

    def __init__(self, config: WorkerConfig, recorder: RecorderHandle) -> None:
        self._config, self._recorder = config, recorder
        self._is_rank_zero = dist.get_rank() == 0
        self._sent: list[ray.ObjectRef[None]] = []
        self._closed = threading.Event()
        self.attempt: int | None = None
        self.step: int | None = None
        self.stop_requested = False

    def begin(self, device: torch.device, start: int, steps: int, notes: Sequence[str] = ()) -> None:
        """Register all workers with the recorder, which returns the number of this attempt.

        Args:
            device: Device of this worker.
            start: Steps that are already done.
            steps: Steps of the whole run.
            notes: Messages for the driver.
        """
        workers: list[WorkerInfo] = [worker_info(self._config, device)] * dist.get_world_size()
        dist.all_gather_object(workers, workers[0])
        info = {
            "zero_stage": self._config.job.parallel.zero_stage,
            "sequence_parallel_size": self._config.layout.sequence_parallel_size,
            "dtype": self._config.dtype,
            "device": workers[0].device,
            "checkpoint_every_steps": self._config.job.checkpoint.every_steps,
        }
        attempt = 0
        if self._is_rank_zero:
            attempt = ray.get(self._recorder.begin_attempt.remote(workers, info, start, steps, notes))
        self.attempt = broadcast_object(attempt)
        self.step = start
        _logger.info("attempt %d: from step %d of %d", self.attempt, start, steps)
        if self._is_rank_zero:
            threading.Thread(target=self._await_stop, daemon=True).start()

    def on_step_end(self, report: StepReport) -> None:
        """Send one message with the metrics of all ranks, without waiting for the answer."""
        self.step = report.step
        if not self._is_rank_zero:
            return
        if len(self._sent) >= _MAX_PENDING_STEPS:  # raises what the recorder raised
            ray.get(self._sent.pop(0))
        self._sent.append(self._recorder.record_step.remote(self.attempt, *step_message(report)))

    def on_evaluate(self, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        """Send the evaluation losses."""
        if self._is_rank_zero:
            sent = self._recorder.record_evaluation.remote(self.attempt, step, loss, dict(by_set))
            self._sent.append(sent)

    def on_save(self, engine: TrainEngine, step: int) -> None:
        """Publish a checkpoint once every step before it is in steps.jsonl; a benchmark run saves nothing."""
        if self._config.benchmark is not None:
            return
        started = time.perf_counter()
        self.flush()
        path = checkpointer.save(
            engine, self._config.checkpoints, step, self.attempt or 0, self._authorize_publish
        )
        self.register_checkpoint(path)
        if self._is_rank_zero:
            retention = retention_of(self._config.job.checkpoint, self._config.run_dir)
            checkpoint_dir.retain(self._config.checkpoints, retention)
            self._sent.append(
                self._recorder.record_checkpoint.remote(self.attempt, step, time.perf_counter() - started)
            )

    def register_checkpoint(self, path: Path) -> None:
        """Report a published checkpoint to Ray Train."""
        latest = ray.train.get_checkpoint()
        if latest is not None and Path(latest.path) == path:
            return
        ray.train.report(
            {"step": checkpoint_dir.step_of(path)},
            checkpoint=ray.train.Checkpoint.from_directory(path),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def end(self) -> None:
        """Report that this attempt has trained all its steps."""
        self.flush()
        if self._is_rank_zero:
            ray.get(self._recorder.finish_training.remote(self.attempt))

    def flush(self) -> None:
        """Wait until the recorder has written every message."""
        ray.get(self._sent)
        self._sent.clear()

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()

    def _await_stop(self) -> None:
        """Poll the recorder for a stop request, outside the training loop."""
        while not self._closed.wait(_STOP_POLL_SECONDS):
            try:
                self.stop_requested = ray.get(self._recorder.stop_requested.remote())
            except Exception:  # the recorder restarts, or this worker is being stopped
                continue
            if self.stop_requested:
                return

    def _authorize_publish(self) -> None:
        ray.get(self._recorder.authorize_publish.remote(self.attempt))


def worker_info(config: WorkerConfig, device: torch.device) -> WorkerInfo:
    """Return the entry of this worker in workers.json."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else "cpu"
    known = hardware.match(name) if on_cuda else hardware.device("cpu")
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return WorkerInfo(
        rank=dist.get_rank(),
        node=ray.util.get_node_ip_address(),
        hostname=os.uname().nodename,
        pid=os.getpid(),
        device=name,
        gpu=str(gpus[0]) if on_cuda and gpus else "",
        peak_flops=known.peak_flops(config.dtype) if known else None,
        memory_limit_bytes=torch.cuda.get_device_properties(device).total_memory if on_cuda else None,
    )


def _group() -> str:
    """Return the id of the placement group, which differs between attempts."""
    placement = ray.util.get_current_placement_group()
    return placement.id.hex() if placement else ""
