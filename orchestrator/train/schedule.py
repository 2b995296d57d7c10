"""The learning rate of each step."""

from __future__ import annotations

import math

from orchestrator.spec import OptimSpec


def learning_rate(optim: OptimSpec, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    It rises linearly over the first warmup_ratio of all steps, from a first part of the peak to the peak, and
    then follows the schedule towards zero.

    Args:
        optim: Peak, shape and warm-up.
        step: Number of the step, from 0.
        steps: Steps of the whole run.
    """
    warmup = math.ceil(
        round(optim.warmup_ratio * steps, 6)
    )  # 0.07 x 100 is 7 steps, and not 7.000000000000001
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr
