"""Optimizers of bitsandbytes: state in 8 bits, in blocks of 256 numbers, or in memory that CUDA pages out.

Under ZeRO a block lies in a partition and not in a weight, so an 8-bit run depends on the number of workers,
within what 8 bits leave open. On CPU nothing is paged out: the state is in host memory already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from orchestrator.checks.packages import bitsandbytes_problem
from orchestrator.errors import SpecError
from orchestrator.parallel.deepspeed_config import BITSANDBYTES


def require_bitsandbytes(optimizer: str) -> None:
    """Refuse an optimizer of bitsandbytes where that is not installed.

    Raises:
        SpecError: It is not.
    """
    problem = bitsandbytes_problem(optimizer)
    if problem:
        raise SpecError(problem)


def split_off(
    ds_config: Mapping[str, Any], trained: Sequence[nn.Parameter]
) -> tuple[Any | None, dict[str, Any]]:
    """Return the optimizer that DeepSpeed cannot make from its configuration, and the rest of that.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
        trained: Parameters to optimize.

    Returns:
        None and the configuration as it is, where DeepSpeed makes the optimizer.
    """
    section = ds_config["optimizer"]
    if section["type"] not in BITSANDBYTES.values():
        return None, dict(ds_config)
    from bitsandbytes import optim

    made = getattr(optim, section["type"])(trained, **section["params"])
    return made, {key: value for key, value in ds_config.items() if key != "optimizer"}
