"""Inspects a DeepSpeed engine: full parameters, full gradients and optimizer state under any ZeRO stage.

`full_parameters` and `full_gradients` are collective: every rank calls them and gets the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

Arrays = dict[str, npt.NDArray[np.float32]]


def full_parameters(model: nn.Module) -> Arrays:
    """Return a float32 copy of every parameter of an engine's model, gathered from all ranks."""
    import deepspeed

    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):  # a no-op for parameters that are not partitioned
            whole[name] = parameter.detach().float().cpu().numpy().copy()
    return whole


def full_gradients(model: nn.Module) -> Arrays:
    """Return the reduced float32 gradient of every trainable parameter.

    Valid between the last backward pass and the optimizer step.
    """
    from deepspeed.utils import safe_get_full_grad

    return {
        # A copy, because without partitioning this is the gradient tensor, which clipping changes in place.
        name: safe_get_full_grad(parameter).float().cpu().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def optimizer_elements(engine: Any) -> int:
    """Return the number of elements for which this rank's optimizer keeps state."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 only
    if partitions is not None:
        return sum(part.numel() for part in partitions)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])


def optimizer_state(engine: Any) -> dict[str, Any]:
    """Return the class of the inner optimizer, and bytes, dtypes and devices of its moments."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [
        value
        for state in inner.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq", "state1", "state2", "momentum_buffer")
    ]
    return {
        "type": type(inner).__name__,
        "moment_bytes": sum(moment.nbytes for moment in moments),
        "dtypes": sorted({str(moment.dtype) for moment in moments}),
        "devices": sorted({moment.device.type for moment in moments}),
    }


@contextmanager
def first_gradients(engine: Any) -> Iterator[Arrays]:
    """Yield a dictionary that receives the gradients of the first optimizer step inside the block."""
    caught: Arrays = {}
    step = engine.step

    def watched() -> None:
        if engine.is_gradient_accumulation_boundary() and not caught:
            caught.update(full_gradients(engine.module))
        step()

    engine.step = watched
    try:
        yield caught
    finally:
        engine.step = step
