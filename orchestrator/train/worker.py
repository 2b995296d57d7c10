"""One worker of the run: Ray Train calls `run_worker` in a process for each device."""

from __future__ import annotations

import logging
import os
from typing import TypedDict

import ray
import torch
from torch import distributed as dist

from orchestrator.arch.model_dims import ModelDims
from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.data import packed_dataset
from orchestrator.engine.memory_limit import limit_memory
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig
from orchestrator.run.recorder_handle import RecorderHandle
from orchestrator.run.run_log import rank_log
from orchestrator.run.worker_config import WorkerConfig, evaluation_loader, training_loader
from orchestrator.train.reporter import Reporter, broadcast_object, reported_failures

_logger = logging.getLogger(__name__)


class WorkerArguments(TypedDict):
    """Arguments of `run_worker`; `recorder` is the actor that keeps the records of the run."""

    config: WorkerConfig
    recorder: RecorderHandle


def run_worker(arguments: WorkerArguments) -> None:
    """Join the process group, build the model, resume from the latest checkpoint, and train to the end.

    Args:
        arguments: What the driver passes as `train_loop_config`.

    Raises:
        OrchestratorError: A failure that a retry cannot fix; it has been reported to the recorder.
    """
    config, recorder = arguments["config"], arguments["recorder"]
    reporter = Reporter(config, recorder)
    limit_bytes = config.benchmark.memory_limit_bytes if config.benchmark else None
    attempt = ray.get(recorder.next_attempt.remote())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with (
        rank_log(config.run_dir, rank, attempt) as log,
        reported_failures(config, reporter, recorder, log),
    ):
        _logger.info("rank %d of %d: pid %d on %s", rank, world_size, os.getpid(), os.uname().nodename)
        device = _load_framework(config)
        with limit_memory(device, limit_bytes):
            _train(config, reporter, device)
        _logger.info("ended after step %s", reporter.step)


def _load_framework(config: WorkerConfig) -> torch.device:
    """Import the heavy modules before the memory limit counts, and return this worker's device."""
    os.environ["DS_ACCELERATOR"] = config.device
    import orchestrator.model.build
    import orchestrator.train.loop  # noqa: F401

    on_cuda = config.device == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _train(config: WorkerConfig, reporter: Reporter, device: torch.device) -> None:
    from orchestrator.engine.deepspeed_engine import join_process_group
    from orchestrator.engine.deepspeed_ops import require_async_io
    from orchestrator.engine.nvme_dir import open_nvme_dir

    job = config.job
    join_process_group(job.run.collective_timeout_seconds)
    if "nvme" in (job.parallel.offload_optimizer, job.parallel.offload_param):
        require_async_io()
    with open_nvme_dir(job, config.deepspeed_config, config.nvme_bytes) as ds_config:
        _train_with(config, ds_config, reporter, device)


def _train_with(
    config: WorkerConfig, ds_config: DeepSpeedConfig, reporter: Reporter, device: torch.device
) -> None:
    from orchestrator.engine.deepspeed_engine import start_engine
    from orchestrator.model.adapters import adapts_last_matmul, num_adapter_params
    from orchestrator.model.attention import select_attn_backend
    from orchestrator.model.build import build_model, load_config, torch_dtype
    from orchestrator.model.loss import TiledHead
    from orchestrator.parallel import ulysses
    from orchestrator.train.loop import TrainContext, train

    job, rank = config.job, dist.get_rank()
    saved = broadcast_object(checkpoint_dir.published(config.checkpoints))
    dtype = torch_dtype(config.dtype)
    model = build_model(job, dtype, ds_config, load_weights=not saved)
    engine = start_engine(model, ds_config)
    restored, notes = checkpointer.load_newest(engine, saved) if saved else (None, [])
    start = restored.step if restored else 0
    loader, packs, steps = training_loader(job, *packed_dataset.load(config.training))
    evaluation = {
        name: evaluation_loader(job, *packed_dataset.load(folder))
        for name, folder in config.evaluation.items()
    }
    context = TrainContext(
        job=job,
        loader=loader,
        packs=packs,
        steps=steps,
        evaluation=evaluation,
        rank=rank,
        layout=config.layout,
        sequence=ulysses.create_sequence_group(config.layout, job.run.collective_timeout_seconds),
        device=device,
        attn_backend=select_attn_backend(job.model.attention, device, dtype, model.config),
        shape=ModelDims.from_config(load_config(job.model).to_dict()),
        head=TiledHead(model, job.model.loss_tile_tokens) if job.model.loss_tile_tokens else None,
        num_adapter_params=num_adapter_params(model),
        adapts_last_matmul=adapts_last_matmul(model),
    )
    reporter.begin(device, start, steps, notes)
    if restored:
        reporter.register_checkpoint(restored.checkpoint)
    train(engine, context, reporter, start)
    reporter.end()
