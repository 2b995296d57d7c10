"""Room for the state of an optimizer that has made no step yet, and its step counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

import torch

from orchestrator.engine.fragments import Fragment, base_optimizer
from orchestrator.engine.train_engine import TrainEngine

StateFormat = Literal["adamw", "muon", "adamw_8bit", "paged_adamw"]
"""Optimizers whose state is the same belong to one format."""
_MOMENTUM = "momentum_buffer"


def state_format(engine: TrainEngine) -> StateFormat:
    """Return the format of the optimizer's state."""
    name = type(base_optimizer(engine)).__name__
    if "Muon" in name:
        return "muon"
    if name in ("AdamW8bit", "PagedAdamW8bit"):
        return "adamw_8bit"
    return "paged_adamw" if name == "PagedAdamW" else "adamw"


def allocate_state(
    engine: TrainEngine, fragment: Fragment, of_group: Sequence[Fragment], keys: Collection[str]
) -> None:
    """Give the optimizer the tensors that a checkpoint has for a parameter, unless it has them.

    Args:
        engine: The engine.
        fragment: The parameter.
        of_group: All fragments with the same key.
        keys: Names of the states in the checkpoint.
    """
    base = base_optimizer(engine)
    state: dict[str, Any] = base.state[fragment.key]
    missing = sorted(set(keys) - state.keys())
    if missing and hasattr(base, "init_state"):  # bitsandbytes
        group = base.param_groups[0]
        params, group["params"] = group["params"], [fragment.key]  # where its settings are looked up
        base.init_state(group, fragment.key, 0, 0)
        group["params"] = params
        return
    for key in missing:
        if key == "step":
            state[key] = _no_steps(base, fragment)
        elif key == _MOMENTUM and 0 < engine.zero_optimization_stage() < 3:
            # Of all whole matrices that overlap this rank's partition.
            last = max(of_group, key=lambda each: each.matrix_at)
            state[key] = fragment.key.new_zeros(last.matrix_at + last.elements)
        else:
            state[key] = torch.zeros_like(fragment.key)


def _no_steps(base: torch.optim.Optimizer, fragment: Fragment) -> int | torch.Tensor:
    """Return a step count of zero as the optimizer's class keeps it."""
    adam = getattr(base, "aux_optimizer", None) or base  # of Muon's other parameters
    if not type(adam).__module__.startswith("torch."):
        return 0
    is_on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    return torch.zeros((), device=fragment.key.device if is_on_device else "cpu")


def set_step(engine: TrainEngine, fragment: Fragment, step: int) -> None:
    """Set the number of steps that the optimizer has made for a parameter."""
    state = cast("dict[str, Any]", base_optimizer(engine).state[fragment.key])
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step
