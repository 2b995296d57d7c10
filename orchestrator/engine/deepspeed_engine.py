"""The DeepSpeed engine of one worker: started, stepped, measured. DeepSpeed's own conventions end here."""

from __future__ import annotations

import logging
import math
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.engine.deepspeed_ops import keep_to_own_environment, load_collectives, load_for
from orchestrator.engine.muon import clip_before_update
from orchestrator.engine.optimizers import split_off
from orchestrator.model.activation_memory import tiled

# DeepSpeed calls these on every reduction, and torch reports each call.
_RENAMED_COLLECTIVES = r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)"
_SEED_SPACE = 2**63  # what torch.manual_seed takes


def join_process_group(collective_timeout_seconds: int) -> None:
    """Let DeepSpeed use the process group that is already initialised.

    Args:
        collective_timeout_seconds: How long a collective may wait.
    """
    keep_to_own_environment()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", _RENAMED_COLLECTIVES, FutureWarning)
    load_collectives()
    deepspeed.init_distributed(timeout=timedelta(seconds=collective_timeout_seconds), verbose=False)


def start_engine(model: nn.Module, ds_config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine around a model.

    Args:
        model: As `build_model` returns it.
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import set_z3_leaf_module

    for mlp in tiled(model):
        set_z3_leaf_module(mlp, True)  # ZeRO-3 gathers its weights once, for all tiles
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_muon = ds_config["optimizer"]["type"] == "Muon"
    if is_muon and get_accelerator().device_name() == "cpu":
        torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon, which takes longer than it saves
    load_for(ds_config)
    optimizer, config = split_off(ds_config, trained)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=config, dist_init_required=False
    )
    _undo_step_before_first(engine)
    if is_muon and engine.zero_optimization_stage() > 0:
        clip_before_update(engine.optimizer, ds_config["gradient_clipping"])
    return engine


def _undo_step_before_first(engine: Any) -> None:
    """Bring back the optimizer as it is before training.

    DeepSpeed's optimizer of ZeRO-0 in bf16 makes room for its state by a step with gradients of zero. That
    step decays the fp32 weights, and AdamW counts it, so that it would correct its moments for one too many.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


def set_learning_rate(engine: Any, value: float, of_muon: float) -> None:
    """Set the learning rate of the next step, in every parameter group but Muon's, and in those."""
    for group in engine.optimizer.param_groups:
        group["lr"] = of_muon if group.get("use_muon", False) else value


def backward(engine: Any, loss: Tensor, factor: float) -> None:
    """Backpropagate a loss that is already normalised over the whole accumulation window.

    Args:
        engine: The engine.
        loss: This rank's part of the loss; the parts of all ranks and micro-batches add up to the mean.
        factor: What DeepSpeed will divide the summed gradients by (`Layout.gradient_divisor`).
    """
    engine.backward(loss * factor, scale_wrt_gas=False)


def end_micro_step(engine: Any) -> None:
    """End a micro-step; the last one of an accumulation window clips the gradient and updates the model.

    ZeRO-0 in fp32 has PyTorch's own optimizer, whose gradient norm DeepSpeed throws away after clipping and
    does not compute without. There every rank has the whole gradient.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer) and engine.is_gradient_accumulation_boundary():
        gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
        engine._global_grad_norm = nn.utils.get_total_norm(gradients)
    engine.step()


def gradient_norm(engine: Any) -> float:
    """Return the L2 norm of the last step's gradient over all ranks, before clipping; it may be NaN."""
    norm = engine.get_global_grad_norm()
    # A negative norm is how DeepSpeed's ZeRO optimizers write one that is no number.
    return float(norm) if norm is not None and norm >= 0 else math.nan


def scales_loss(engine: Any) -> bool:
    """Tell whether the loss is scaled, as in fp16: a skipped step then means that the scale was too high."""
    return bool(engine.fp16_enabled())


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, also of those that ZeRO-3 has partitioned away."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from the place in the run, so that a resumed run draws what the undisturbed one draws."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % _SEED_SPACE)
