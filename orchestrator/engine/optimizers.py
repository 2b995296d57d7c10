"""Optimizers of bitsandbytes: 8-bit state in blocks of 256 values, or state in paged memory.

Under ZeRO a block is part of a partition and not of a parameter, so the result of an 8-bit run depends on
the number of workers, within quantization error. On CPU nothing is paged: the state is in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from orchestrator.checks.packages import bitsandbytes_problem
from orchestrator.errors import SpecError
from orchestrator.parallel.deepspeed_config import BITSANDBYTES, DeepSpeedConfig


def require_bitsandbytes(optimizer: str) -> None:
    """Raise if an optimizer needs bitsandbytes and it is not installed.

    Raises:
        SpecError: bitsandbytes is not installed.
    """
    problem = bitsandbytes_problem(optimizer)
    if problem:
        raise SpecError(problem)


def build_optimizer(
    ds_config: DeepSpeedConfig, trainable: Sequence[nn.Parameter]
) -> tuple[torch.optim.Optimizer | None, DeepSpeedConfig]:
    """Build the optimizer if DeepSpeed cannot build it from its configuration.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
        trainable: Parameters to optimize.

    Returns:
        The optimizer, and the configuration without its section. None and the whole configuration if
        DeepSpeed builds the optimizer.
    """
    section = ds_config["optimizer"]
    if section["type"] not in BITSANDBYTES.values():
        return None, dict(ds_config)
    from bitsandbytes import optim

    optimizer: torch.optim.Optimizer = getattr(optim, section["type"])(trainable, **section["params"])
    return optimizer, {key: value for key, value in ds_config.items() if key != "optimizer"}
