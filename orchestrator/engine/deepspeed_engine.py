"""Initialize DeepSpeed's engine, run its micro-steps and read its gradient norm."""

from __future__ import annotations

import logging
import math
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from orchestrator.engine.deepspeed_ops import (
    isolate_extension_cache,
    load_ops,
    load_shared_memory_collectives,
)
from orchestrator.engine.muon import clip_before_update
from orchestrator.engine.optimizers import build_optimizer
from orchestrator.engine.train_engine import TrainEngine, ZeroOptimizer
from orchestrator.model.activation_memory import tiled_mlps
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# DeepSpeed calls these deprecated names at every reduction, and torch warns at every call.
_DEPRECATED_COLLECTIVES = r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)"
_NUM_SEEDS = 2**63  # torch.manual_seed takes 63 bits


def join_process_group(collective_timeout_seconds: int) -> None:
    """Let DeepSpeed use the default process group, which is already initialized.

    Args:
        collective_timeout_seconds: Timeout of a collective.
    """
    isolate_extension_cache()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", _DEPRECATED_COLLECTIVES, FutureWarning)
    load_shared_memory_collectives()
    deepspeed.init_distributed(timeout=timedelta(seconds=collective_timeout_seconds), verbose=False)


def start_engine(model: PreTrainedModel | PeftModel, ds_config: DeepSpeedConfig) -> TrainEngine:
    """Return DeepSpeed's engine around a model.

    Args:
        model: As `build_model` returns it.
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import set_z3_leaf_module

    for mlp in tiled_mlps(model):
        # A leaf module is gathered as a whole: ZeRO-3 then gathers its weights once instead of once a tile.
        set_z3_leaf_module(mlp, True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_muon = ds_config["optimizer"]["type"] == "Muon"
    if is_muon and get_accelerator().device_name() == "cpu":
        # DeepSpeed compiles Muon's update; on CPU compilation takes longer than it saves.
        torch.compiler.set_stance("force_eager")
    load_ops(ds_config)
    optimizer, engine_config = build_optimizer(ds_config, trainable)
    engine: TrainEngine
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=optimizer,
        config=engine_config,
        dist_init_required=False,
    )
    _undo_initialization_step(engine)
    if is_muon and engine.zero_optimization_stage() > 0:
        clip_before_update(cast(ZeroOptimizer, engine.optimizer), ds_config["gradient_clipping"])
    return engine


def _undo_initialization_step(engine: TrainEngine) -> None:
    """Reset the optimizer to its state before training.

    DeepSpeed's bf16 optimizer of ZeRO-0 allocates its state by a step with zero gradients. That step applies
    weight decay to the fp32 weights, and AdamW counts it, so that its bias correction is off by one step.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer: object = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        optimizer.refresh_fp32_params()


def set_learning_rate(engine: TrainEngine, learning_rate: float, muon_learning_rate: float) -> None:
    """Set the learning rates of the next step: of Muon's parameter groups, and of all others."""
    for group in engine.optimizer.param_groups:
        group["lr"] = muon_learning_rate if group.get("use_muon", False) else learning_rate


def backward(engine: TrainEngine, loss: Tensor, gradient_divisor: float) -> None:
    """Backpropagate a loss that is already normalized by the tokens of all micro-batches and ranks.

    Args:
        engine: The engine.
        loss: This rank's share of the loss; the shares of all ranks and micro-batches sum to the mean.
        gradient_divisor: What DeepSpeed divides summed gradients by (`ParallelDims.gradient_divisor`).
    """
    engine.backward(loss * gradient_divisor, scale_wrt_gas=False)


def end_micro_step(engine: TrainEngine) -> None:
    """End a micro-step; the last one of a step clips the gradient and updates the parameters.

    ZeRO-0 in fp32 uses PyTorch's own optimizer. DeepSpeed discards its gradient norm after clipping, and
    does not compute one without clipping, so it is computed here; every rank has the whole gradient.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer) and engine.is_gradient_accumulation_boundary():
        gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
        engine._global_grad_norm = nn.utils.get_total_norm(gradients)
    engine.step()


def gradient_norm(engine: TrainEngine) -> float:
    """Return the L2 norm of the last step's gradient over all ranks, before clipping; it may be NaN."""
    norm = engine.get_global_grad_norm()
    # DeepSpeed's ZeRO optimizers encode a NaN or infinite norm as -1.
    return float(norm) if norm is not None and norm >= 0 else math.nan


def uses_loss_scaling(engine: TrainEngine) -> bool:
    """Return whether the loss is scaled (fp16); a skipped step then means that the scale was too high."""
    return bool(engine.fp16_enabled())


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; ZeRO-3 partitions them, and ds_numel is the size before that."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by step and rank, so that a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % _NUM_SEEDS)
