"""The learning rate of each step."""

from __future__ import annotations

import math

from orchestrator.config.schema import OptimSpec


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


def replanned(before: OptimSpec, now: OptimSpec, done: int, steps_before: int, steps_now: int) -> str:
    """Say in a sentence what becomes of the schedule of a run that is to have another number of steps.

    Args:
        before: As the run has been trained so far.
        now: As it is to go on.
        done: Steps that are done.
        steps_before: Steps that the run was to have.
        steps_now: Steps that it is to have.
    """
    told = f"the run goes on from step {done} to step {steps_now} in place of {steps_before}"
    if not done or done >= steps_now:
        return told
    last, following = learning_rate(before, done - 1, steps_before), learning_rate(now, done, steps_now)
    change = (
        "stays" if math.isclose(last, following, rel_tol=1e-9) else f"was {last:.3g} in step {done} and is"
    )
    what = "schedule" if now.schedule == "constant" else f"{now.schedule} schedule, which now ends there"
    return f"{told}; by its {what}, the learning rate {change} {following:.3g} in step {done + 1}"
