"""The state of training as named tensors: the fp32 weights, the optimizer's state, and DeepSpeed's counters.

    model.NAME              the fp32 weight of a trained parameter, or a persistent buffer
    optimizer.NAME.KEY      a state of the optimizer, of the shape of the parameter; `step` is one number
    blocks.WHOSE.KEY        state in blocks of a partition (8-bit), which fits the same layout only

Frozen weights are not part of it: they come from the base model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orchestrator.checkpoint.manifest import BLOCKS, MODEL, OPTIMIZER
from orchestrator.checkpoint.tensor_parts import Parts, TensorPart
from orchestrator.engine.fragments import (
    Fragment,
    base_optimizer,
    fragments,
    is_on_nvme,
    prepare_to_replace,
)
from orchestrator.engine.nvme_state import mapped_optimizer_state, replaced_sub_groups
from orchestrator.engine.optimizer_state import allocate_state, set_step
from orchestrator.engine.train_engine import TrainEngine

_STEP = "step"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@contextmanager
def saved_parts(engine: TrainEngine) -> Iterator[dict[str, TensorPart]]:
    """Give this rank's parts of the state, between two steps; tensors alias the engine's memory."""
    with mapped_optimizer_state(engine):
        yield {**_parts(engine), **_buffers(engine)}


def replace_state(engine: TrainEngine, saved: Collection[str], fill: Callable[[Parts], None]) -> None:
    """Replace the fp32 weights and the optimizer's state; afterwards `refresh_weights` must be called.

    Not collective, so that an error on one rank can be told to the others.

    Args:
        engine: The engine, new or after any number of steps.
        saved: Names of the tensors of the checkpoint.
        fill: Reads the values of parts. Called once, or with parameters on NVMe once for each sub-group.
    """
    keys: dict[str, set[str]] = defaultdict(set)
    for name in saved:
        section, _, rest = name.partition(".")
        if section != MODEL:
            owner, _, key = rest.rpartition(".")
            keys[owner].add(key)
    held = list(fragments(engine))
    by_group: dict[int, list[Fragment]] = defaultdict(list)
    for fragment in held:
        by_group[fragment.group].append(fragment)

    def fill_groups(chosen: list[Fragment]) -> None:
        for fragment in chosen:
            wanted = keys[fragment.name] | keys[_owner(engine, fragment)]
            of_group = by_group[fragment.group]
            allocate_state(engine, fragment, of_group, wanted)
        parts = _parts(engine, chosen)
        fill(parts)
        for fragment in chosen:
            step = parts.get(f"{OPTIMIZER}.{fragment.name}.{_STEP}")
            if step is not None:
                set_step(engine, fragment, int(step.values))

    prepare_to_replace(engine)
    if is_on_nvme(engine):
        for group in replaced_sub_groups(engine):
            fill_groups(by_group[group])
    else:
        fill_groups(held)
    fill(_buffers(engine))


def _parts(engine: TrainEngine, chosen: list[Fragment] | None = None) -> dict[str, TensorPart]:
    found: dict[str, TensorPart] = {}
    state = base_optimizer(engine).state
    for fragment in fragments(engine) if chosen is None else chosen:
        found[f"{MODEL}.{fragment.name}"] = _part(fragment, fragment.key)
        of_key = state.get(fragment.key, {})
        in_blocks = _is_in_blocks(of_key)
        for key, value in of_key.items():
            if key == _STEP:
                step = torch.tensor([int(value)], dtype=torch.int64)
                found[f"{OPTIMIZER}.{fragment.name}.{key}"] = TensorPart(step, 0, 1)
            elif isinstance(value, Tensor) and not in_blocks:
                found[f"{OPTIMIZER}.{fragment.name}.{key}"] = _part(fragment, value)
            elif isinstance(value, Tensor) and not key.startswith("qmap"):  # constants
                found[f"{BLOCKS}.{_owner(engine, fragment)}.{key}"] = _whole(value)
    return found


def _part(fragment: Fragment, buffer: Tensor) -> TensorPart:
    values, start = fragment.of(buffer)
    return TensorPart(values, start, fragment.elements)


def _whole(tensor: Tensor) -> TensorPart:
    return TensorPart(tensor.detach().view(-1), 0, tensor.numel())


def _is_in_blocks(state: dict[str, Any]) -> bool:
    """Return whether an optimizer keeps quantized state, whose scales are those of blocks of the tensor."""
    return any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in state.values())


def _owner(engine: TrainEngine, fragment: Fragment) -> str:
    """Return whose blocks they are: a parameter's under ZeRO-0, or else a partition's."""
    if engine.zero_optimization_stage() == 0 and fragment.is_alone:
        return fragment.name
    return f"group{fragment.group}.rank{dist.get_rank()}"


def _buffers(engine: TrainEngine) -> dict[str, TensorPart]:
    return {f"{MODEL}.{name}": _whole(buffer) for name, buffer in _persistent_buffers(engine).items()}


def _persistent_buffers(engine: TrainEngine) -> dict[str, Tensor]:
    """Return the persistent buffers of a model that is trained as a whole.

    Those of a frozen base model, such as of quantized layers, are its own.
    """
    if not all(parameter.requires_grad for parameter in engine.module.parameters()):
        return {}
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in engine.module.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def shapes(engine: TrainEngine) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained parameters and saved buffers by name, whichever rank holds them."""
    found = {
        name: tuple(getattr(weight, "ds_shape", weight.shape))
        for name, weight in engine.module.named_parameters()
        if weight.requires_grad
    }
    return found | {name: tuple(buffer.shape) for name, buffer in _persistent_buffers(engine).items()}


def shape_of(known: Mapping[str, tuple[int, ...]], name: str, flat: Sequence[int]) -> list[int]:
    """Return the shape of a tensor of the state: that of its parameter or buffer, if it has as many elements.

    Args:
        known: The result of `shapes`.
        name: Name of the tensor in the state.
        flat: [elements].
    """
    rest = name.partition(".")[2]
    for owner in (rest, rest.rpartition(".")[0]):
        if owner in known and math.prod(known[owner]) == flat[0]:
            return list(known[owner])
    return list(flat)


def tied_names(engine: TrainEngine) -> dict[str, str]:
    """Return the name under which a tied weight is saved, by each of its other names."""
    first = {id(weight): name for name, weight in engine.module.named_parameters()}
    return {
        name: first[id(weight)]
        for name, weight in engine.module.named_parameters(remove_duplicate=False)
        if weight.requires_grad and first[id(weight)] != name
    }


def counters(engine: TrainEngine) -> dict[str, Any]:
    """Return DeepSpeed's counters, and those of the loss scale (fp16)."""
    scaler = _scaler(engine)
    return {
        **{name: int(getattr(engine, name)) for name in _COUNTERS},
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
    }


def _scaler(engine: TrainEngine) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def restore_counters(engine: TrainEngine, saved: dict[str, Any]) -> None:
    """Set DeepSpeed's counters and loss scale to those of `counters`."""
    for name in _COUNTERS:
        setattr(engine, name, saved[name])
    # Counted by worker: DeepSpeed updates at multiples of this run's accumulation steps.
    engine.micro_steps = saved["global_steps"] * engine.gradient_accumulation_steps()
    scaler = _scaler(engine)
    for name, value in saved["loss_scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
