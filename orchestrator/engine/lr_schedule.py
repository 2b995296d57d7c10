"""Learning rate lr_scheduler: linear warmup, then cosine, linear or constant."""

from __future__ import annotations

import math

from orchestrator.config.schema import OptimSpec


def learning_rate(optim: OptimSpec, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Warmup takes ceil(warmup_ratio * steps) steps: the first one has peak / warmup, the last one the peak.
    The schedule then decays from the peak towards zero.

    Args:
        optim: Peak learning rate, schedule and warmup ratio.
        step: Index of the step, from 0.
        steps: Number of steps of the whole run.
    """
    # Rounded first, or 0.07 * 100 = 7.000000000000001 would give 8 warmup steps.
    warmup = math.ceil(round(optim.warmup_ratio * steps, 6))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if optim.lr_scheduler == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    if optim.lr_scheduler == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr


def schedule_change_message(old: OptimSpec, new: OptimSpec, done: int, old_steps: int, new_steps: int) -> str:
    """Describe how the schedule changes when a run resumes with another number of steps.

    Args:
        old: Settings of the run so far.
        new: Settings with which it resumes.
        done: Completed steps.
        old_steps: Number of steps that was planned before.
        new_steps: Number of steps that is planned now.
    """
    message = f"the run resumes from step {done} and trains to step {new_steps} instead of {old_steps}"
    if not done or done >= new_steps:
        return message
    last_rate, next_rate = learning_rate(old, done - 1, old_steps), learning_rate(new, done, new_steps)
    is_same = math.isclose(last_rate, next_rate, rel_tol=1e-9)
    change = "stays" if is_same else f"was {last_rate:.3g} in step {done} and is"
    schedule = (
        "schedule" if new.lr_scheduler == "constant" else f"{new.lr_scheduler} schedule, which now ends there"
    )
    return f"{message}; by its {schedule}, the learning rate {change} {next_rate:.3g} in step {done + 1}"
