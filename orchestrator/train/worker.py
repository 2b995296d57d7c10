"""One worker of the run: what Ray Train starts on every device."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from torch import distributed as dist

from orchestrator.arch.model_dims import ModelShape
from orchestrator.checkpoint import checkpointer
from orchestrator.cluster import hardware
from orchestrator.data import packed_dataset
from orchestrator.engine.memory_limit import is_out_of_memory, limited_memory
from orchestrator.errors import MemoryExhaustedError, OrchestratorError
from orchestrator.metrics.meter import RankSteps
from orchestrator.run.failures import Failure
from orchestrator.run.recorder import WorkerInfo
from orchestrator.run.run_log import rank_log
from orchestrator.run.worker_config import WorkerConfig, evaluation_loader, training_loader
from orchestrator.train.suggestions import memory_remedies

_STOP_POLL_SECONDS = 0.5
_SECONDS_TO_REPORT = 30.0
_logger = logging.getLogger(__name__)


def run_worker(arguments: dict[str, Any]) -> None:
    """Join the group, build the model, resume where the run stands, and train to the end.

    Args:
        arguments: `config`, a `WorkerConfig`, and `recorder`, the actor that keeps its records.

    Raises:
        OrchestratorError: A failure that starting again cannot mend; the recorder has been told.
    """
    config: WorkerConfig = arguments["config"]
    recorder = arguments["recorder"]
    reporter = _Reporter(config, recorder)
    limit_bytes = config.benchmark.memory_limit_bytes if config.benchmark else None
    attempt = ray.get(recorder.next_attempt.remote())
    with (
        rank_log(config.run_dir, dist.get_rank(), attempt) as log,
        _reported(config, reporter, recorder, log),
    ):
        _logger.info(
            "rank %d of %d: process %d on %s",
            dist.get_rank(),
            dist.get_world_size(),
            os.getpid(),
            os.uname().nodename,
        )
        device = _load_framework(config)
        with limited_memory(device, limit_bytes):
            _train(config, reporter, device)
        _logger.info("ended after step %s", reporter.step)


@contextmanager
def _reported(config: WorkerConfig, reporter: _Reporter, recorder: Any, log: Path) -> Iterator[None]:
    """Write what is raised to the rank's log, and tell the recorder, which decides whether to try again.

    Raises:
        MemoryExhaustedError: In place of what torch and the system raise then.
    """
    try:
        yield
    except OrchestratorError as error:
        _logger.exception("this rank failed, and starting again would not help")
        ray.get(recorder.report_fatal.remote(error, reporter.attempt))
        raise
    except Exception as error:
        _logger.exception("this rank failed")
        if isinstance(error, RuntimeError | MemoryError | OSError) and is_out_of_memory(error):
            fatal = MemoryExhaustedError(
                f"rank {dist.get_rank()} ran out of memory ({(str(error) or 'none left').splitlines()[0]}); "
                f"{memory_remedies(config.job, config.device)}"
            )
            ray.get(recorder.report_fatal.remote(fatal, reporter.attempt))
            raise fatal from error
        failure = Failure.from_exception(error, _group(), dist.get_rank(), reporter.step, str(log))
        try:  # the recorder may be what failed
            ray.get(recorder.report_failure.remote(failure), timeout=_SECONDS_TO_REPORT)
        except Exception:
            _logger.exception("the recorder was not told of it")
        raise
    finally:
        reporter.close()


def _group() -> str:
    """Return what tells this try's workers from those of the try before: each has its own placement group."""
    placement = ray.util.get_current_placement_group()
    return placement.id.hex() if placement else ""


def _load_framework(config: WorkerConfig) -> torch.device:
    """Load what a worker needs, which is not part of what training takes, and return its device."""
    os.environ["DS_ACCELERATOR"] = config.device
    import orchestrator.model.build
    import orchestrator.train.loop  # noqa: F401

    on_cuda = config.device == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _train(config: WorkerConfig, reporter: _Reporter, device: torch.device) -> None:
    from orchestrator.engine.deepspeed_engine import join_process_group
    from orchestrator.engine.deepspeed_ops import require_async_io
    from orchestrator.engine.nvme_dir import swap_folder

    job = config.job
    join_process_group(job.run.collective_timeout_seconds)
    if "nvme" in (job.parallel.offload_optimizer, job.parallel.offload_param):
        require_async_io()
    with swap_folder(job, config.deepspeed_config, config.nvme_bytes) as ds_config:
        _train_with(config, ds_config, reporter, device)


def _train_with(
    config: WorkerConfig, ds_config: dict[str, Any], reporter: _Reporter, device: torch.device
) -> None:
    from orchestrator.engine.deepspeed_engine import start_engine
    from orchestrator.model.adapters import adapter_parameters, adapts_last_product
    from orchestrator.model.attention import kernel_for
    from orchestrator.model.build import build_model, load_config, torch_dtype
    from orchestrator.model.loss import TiledHead
    from orchestrator.parallel import ulysses
    from orchestrator.train.loop import TrainContext, train

    job, rank = config.job, dist.get_rank()
    saved = _broadcast_object(checkpointer.published(config.checkpoints)[-1:])
    dtype = torch_dtype(config.dtype)
    model = build_model(job, dtype, ds_config, load_weights=not saved)
    engine = start_engine(model, ds_config)
    start = checkpointer.load(engine, saved[0]) if saved else 0
    loader, packs, steps = training_loader(job, *packed_dataset.load(config.training))
    evaluation = (
        evaluation_loader(job, *packed_dataset.load(config.evaluation)) if config.evaluation else None
    )
    context = TrainContext(
        job=job,
        loader=loader,
        packs=packs,
        steps=steps,
        evaluation=evaluation,
        rank=rank,
        layout=config.layout,
        sequence=ulysses.join(config.layout, job.run.collective_timeout_seconds),
        device=device,
        kernel=kernel_for(job.model.attention, device, dtype, model.config),
        shape=ModelShape.from_config(load_config(job.model).to_dict()),
        head=TiledHead(model, job.model.loss_tile_tokens) if job.model.loss_tile_tokens else None,
        adapter_parameters=adapter_parameters(model),
        adapted_last=adapts_last_product(model),
    )
    reporter.begin(device, start, steps)
    if saved:
        reporter.register_checkpoint(saved[0])
    train(engine, context, reporter, start)
    reporter.end()


def _broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _describe(config: WorkerConfig, device: torch.device) -> WorkerInfo:
    """Return who this worker is, as workers.json lists it."""
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


def message(report: Any) -> tuple[dict[str, float], RankSteps]:
    """Return what the recorder is told of a finished step."""
    values = {
        "step": report.step,
        "epoch": report.epoch,
        "seconds": report.seconds,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "skipped": report.skipped,
    }
    return values, report.ranks


class _Reporter:
    """Tells the recorder from rank 0 what happened, and Ray Train of each checkpoint from every rank."""

    def __init__(self, config: WorkerConfig, recorder: Any) -> None:
        self._config, self._recorder = config, recorder
        self._is_rank_zero = dist.get_rank() == 0
        self._sent: list[Any] = []
        self._closed = threading.Event()
        self.attempt: int | None = None
        self.step: int | None = None
        self.stop_requested = False

    def begin(self, device: torch.device, start: int, steps: int) -> None:
        """Tell the recorder who takes part, and learn the number of this attempt."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, _describe(self._config, device))
        info = {
            "zero_stage": self._config.job.parallel.zero_stage,
            "sequence_parallel_size": self._config.layout.sequence_parallel_size,
            "dtype": self._config.dtype,
            "device": everyone[0].device,
            "checkpoint_every_steps": self._config.job.checkpoint.every_steps,
        }
        begun = (
            self._recorder.begin_attempt.remote(everyone, info, start, steps) if self._is_rank_zero else None
        )
        self.attempt = int(_broadcast_object(ray.get(begun) if begun else None))
        self.step = start
        _logger.info("attempt %d: from step %d of %d", self.attempt, start, steps)
        if self._is_rank_zero:
            threading.Thread(target=self._await_stop, daemon=True).start()

    def on_step_end(self, report: Any) -> None:
        """Send one message with what all ranks did; nobody waits for it."""
        self.step = report.step
        if not self._is_rank_zero:
            return
        if len(self._sent) >= 8:  # an error that the recorder raised must not stay unseen
            ray.get(self._sent.pop(0))
        self._sent.append(self._recorder.record_step.remote(self.attempt, *message(report)))

    def on_evaluate(self, step: int, loss: float) -> None:
        """Send a loss on held-out rows."""
        if self._is_rank_zero:
            self._sent.append(self._recorder.record_evaluation.remote(self.attempt, step, loss))

    def on_save(self, engine: Any, step: int) -> None:
        """Publish a checkpoint, once every step before it is on disk; of a benchmark nothing is kept."""
        if self._config.benchmark is not None:
            return
        started = time.perf_counter()
        self.flush()
        path = checkpointer.save(
            engine, self._config.checkpoints, step, self.attempt or 0, self._authorize_publish
        )
        self.register_checkpoint(path)
        if self._is_rank_zero:
            checkpointer.retain(self._config.checkpoints, self._config.job.checkpoint.keep)
            self._sent.append(
                self._recorder.record_checkpoint.remote(self.attempt, step, time.perf_counter() - started)
            )

    def register_checkpoint(self, path: Path) -> None:
        """Make a published checkpoint known to Ray Train."""
        known = ray.train.get_checkpoint()
        if known is not None and Path(known.path) == path:
            return
        ray.train.report(
            {"step": checkpointer.step_of(path)},
            checkpoint=ray.train.Checkpoint.from_directory(path),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def end(self) -> None:
        """Tell the recorder that this attempt has done what it was to do."""
        self.flush()
        if self._is_rank_zero:
            ray.get(self._recorder.finish_training.remote(self.attempt))

    def flush(self) -> None:
        """Wait until the recorder has written all that was sent."""
        ray.get(self._sent)
        self._sent.clear()

    def close(self) -> None:
        """End what runs in the background."""
        self._closed.set()

    def _await_stop(self) -> None:
        """Ask the recorder every now and then whether to stop; the training loop does not wait for it."""
        while not self._closed.wait(_STOP_POLL_SECONDS):
            try:
                self.stop_requested = ray.get(self._recorder.stop_requested.remote())
            except Exception:  # it is being started anew, or this worker is being ended
                continue
            if self.stop_requested:
                return

    def _authorize_publish(self) -> None:
        ray.get(self._recorder.authorize_publish.remote(self.attempt))
