"""Looking into a DeepSpeed engine: whole parameters and whole gradients, whichever way they are partitioned.

Both functions are collective: every rank calls them, and every rank gets the result.
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
    """Return a copy of every parameter of a model that an engine trains, in float32."""
    import deepspeed

    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):  # does nothing where it is not partitioned
            whole[name] = parameter.detach().float().cpu().numpy().copy()
    return whole


def full_gradients(model: nn.Module) -> Arrays:
    """Return the reduced gradient of every parameter, between the last backward pass and the update."""
    from deepspeed.utils import safe_get_full_grad

    return {
        # A copy: without partitions this is the gradient itself, which clipping changes in place.
        name: safe_get_full_grad(parameter).float().cpu().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def optimizer_elements(engine: Any) -> int:
    """Return how many numbers this rank's optimizer keeps state for."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps them apart
    if partitions is not None:
        return sum(part.numel() for part in partitions)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])


def optimizer_state(engine: Any) -> dict[str, Any]:
    """Return the class of the optimizer that steps, and size, number formats and devices of its moments."""
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
    """Catch the gradients of the first optimizer step that an engine makes inside the block."""
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
