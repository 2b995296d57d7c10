"""The training loop of one worker.

Read `train` first. It is handed everything that is already decided: the engine, which packs belong to which
step, how many steps there are, and whom to tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import distributed as dist

from orchestrator.arch.flops import (
    Frozen,
    Recomputation,
    forward_flops,
    hardware_flops,
    model_flops,
    square_within,
)
from orchestrator.arch.model_dims import ModelShape
from orchestrator.config.schema import JobSpec
from orchestrator.data.loader import MicroBatch, PackLoader
from orchestrator.engine.deepspeed_engine import (
    backward,
    end_micro_step,
    gradient_norm,
    scales_loss,
    seed_step,
    set_learning_rate,
)
from orchestrator.engine.lr_schedule import learning_rate
from orchestrator.engine.step_timer import StepClock, memory
from orchestrator.errors import TrainingError
from orchestrator.metrics.meter import RankStep, RankSteps
from orchestrator.model.attention import Kernel
from orchestrator.model.loss import Inputs, TiledHead, loss_sum
from orchestrator.parallel.parallel_dims import Layout
from orchestrator.parallel.ulysses import SequenceGroup


@dataclass(frozen=True)
class TrainContext:
    """What one worker needs to know of the whole run.

    Attributes:
        job: The job.
        loader: Training packs by step.
        packs: Training packs of all steps together; places beyond it are empty.
        steps: Optimizer steps.
        evaluation: Held-out packs by step, and how many there are.
        rank: Rank of this worker.
        layout: Degrees of parallelism; say which packs, and which part of them, this worker reads.
        sequence: The workers that share a row with this one; None where it holds its rows alone.
        device: Where the model is.
        kernel: How attention is computed.
        shape: For FLOPs; None leaves them out.
        head: The LM head, where it scores labels by tiles.
        adapter_parameters: Weights of LoRA's matrices, for FLOPs.
        adapted_last: Whether some of them stand beside the last product of a layer.
    """

    job: JobSpec
    loader: PackLoader
    packs: int
    steps: int
    evaluation: tuple[PackLoader, int] | None
    rank: int
    layout: Layout
    sequence: SequenceGroup | None
    device: torch.device
    kernel: Kernel
    shape: ModelShape | None
    head: TiledHead | None = None
    adapter_parameters: int = 0
    adapted_last: bool = False

    def batches(self, loader: PackLoader, step: int, packs: int) -> Iterator[MicroBatch]:
        """Yield this worker's part of its micro-batches of a step."""
        layout = self.layout
        return loader.micro_batches(
            step, layout.data_parallel_rank(self.rank), packs, layout.sequence_rank(self.rank)
        )

    def inputs(self, batch: MicroBatch) -> Inputs:
        """Return a micro-batch as the model takes it."""
        return Inputs.of(batch, self.kernel, self.device, self.sequence)


@dataclass(frozen=True)
class StepReport:
    """A finished optimizer step, the same on every rank."""

    step: int
    epoch: float
    seconds: float
    learning_rate: float
    gradient_norm: float
    skipped: bool
    ranks: RankSteps

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the step's trained tokens."""
        return self.ranks.loss


class Callback(Protocol):
    """Who is told what happens, and saves."""

    @property
    def stop_requested(self) -> bool:
        """Whether this rank knows that the run is to stop; one rank that does is enough."""

    def on_step_end(self, report: StepReport) -> None:
        """Take note of a finished step."""

    def on_evaluate(self, step: int, loss: float) -> None:
        """Take note of a loss on held-out rows."""

    def on_save(self, engine: Any, step: int) -> None:
        """Write a checkpoint; every rank calls it at the same step."""


def train(engine: Any, context: TrainContext, callback: Callback, start_step: int = 0) -> None:
    """Train from a step to the end, or until the run is told to stop, when all ranks save the same step.

    Args:
        engine: DeepSpeed's engine, its state that of `start_step`.
        context: The run.
        callback: Told of every step; saves checkpoints.
        start_step: Steps that are already done.

    Raises:
        TrainingError: The loss or the gradient is no longer a number.
    """
    job = context.job
    clock = StepClock(context.device)
    for step in range(start_step, context.steps):
        rate = learning_rate(job.optim, step, context.steps)
        set_learning_rate(engine, rate, rate * (job.optim.muon_lr or 0.0) / job.optim.lr)
        seed_step(job.run.seed, step, context.rank)
        mine = run_step(engine, context, step, clock)
        ranks, is_stopped = gather(mine, context.device, callback.stop_requested)
        done = step + 1
        report = StepReport(
            step=done,
            epoch=context.loader.epoch(done, context.packs),
            seconds=clock.lap(),
            learning_rate=rate,
            gradient_norm=gradient_norm(engine),
            skipped=not engine.was_step_applied(),
            ranks=ranks,
        )
        callback.on_step_end(report)
        require_finite(report, scales_loss(engine))
        is_stopped = is_stopped and done < context.steps
        if is_stopped:  # the time that is left may not be enough for an evaluation
            callback.on_save(engine, done)
        if job.eval and is_due(job.eval.every_steps, done, context.steps):
            callback.on_evaluate(done, evaluate(engine, context))
        if is_stopped:
            return
        if is_due(job.checkpoint.every_steps, done, context.steps):
            callback.on_save(engine, done)
        clock.restart()


def run_step(engine: Any, context: TrainContext, step: int, clock: StepClock) -> RankStep:
    """Run this worker's micro-batches of one optimizer step, and the update."""
    batches = context.batches(context.loader, step, context.packs)
    window_tokens = max(1, context.loader.trained_tokens(step, context.packs))
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    work = []
    for _ in range(context.job.gradient_accumulation_steps):
        with clock.phase("data"):
            batch = next(batches)
            inputs = context.inputs(batch)
        with clock.phase("forward"):
            loss = loss_sum(engine, inputs, context.head)
        with clock.phase("backward"):
            backward(engine, loss / window_tokens, context.layout.gradient_divisor)
        with clock.phase("optimizer"):
            end_micro_step(engine)
        total += loss.detach()
        work.append(batch)
    return measure(context, work, total.item(), clock)


def measure(context: TrainContext, work: Sequence[MicroBatch], loss: float, clock: StepClock) -> RankStep:
    """Return what this rank did in the step that is about to end."""
    model_work = hardware_work = 0.0
    if context.shape is not None:
        model, layout, method = context.job.model, context.layout, context.job.method
        frozen = Frozen(method.type == "lora", method.type == "lora" and not method.train_embeddings)
        for batch in work:
            windowed = square_within(batch.real_lengths, context.shape.window) / layout.sequence_parallel_size
            forward = forward_flops(
                context.shape,
                batch.tokens,
                batch.square_tokens,
                batch.trained_tokens,
                windowed,
                context.adapter_parameters,
            )
            again = Recomputation(
                model.gradient_checkpointing,
                context.job.parallel.zero_stage,
                tiled_head=context.head is not None,
                mlp_tiles=-(-len(batch.input_ids) // model.mlp_tile_tokens) if model.mlp_tile_tokens else 0,
                adapted_last=context.adapted_last,
            )
            model_work += model_flops(forward, frozen)
            hardware_work += hardware_flops(forward, again, frozen)
    phases = clock.phases()
    return RankStep(
        loss_sum=loss,
        tokens=sum(batch.tokens for batch in work),
        trained_tokens=sum(batch.trained_tokens for batch in work),
        slots=sum(len(batch.input_ids) for batch in work),
        flops_model=model_work,
        flops_hardware=hardware_work,
        data_seconds=phases["data"],
        forward_seconds=phases["forward"],
        backward_seconds=phases["backward"],
        optimizer_seconds=phases["optimizer"],
        **memory(context.device),
    )


def gather(mine: RankStep, device: torch.device, stop_requested: bool) -> tuple[RankSteps, bool]:
    """Return what every rank did, by rank, and whether any of them knows that the run is to stop.

    One small collective a step, which also ends the step for all.
    """
    vector = torch.tensor([*mine.vector(), float(stop_requested)], dtype=torch.float64, device=device)
    everyone = vector.new_empty(dist.get_world_size() * len(vector))
    dist.all_gather_into_tensor(everyone, vector)
    rows = everyone.view(-1, len(vector)).cpu().numpy()
    return RankSteps(rows[:, :-1]), bool(rows[:, -1].any())


def evaluate(engine: Any, context: TrainContext) -> float:
    """Return the mean cross-entropy over the trained tokens of the held-out packs."""
    if context.evaluation is None:
        raise ValueError("evaluate needs a context with held-out packs")
    loader, packs = context.evaluation
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)
    engine.eval()
    with torch.no_grad():
        for step in range(loader.steps(1.0)):
            for batch in context.batches(loader, step, packs):
                loss = loss_sum(engine, context.inputs(batch), context.head)
                totals += torch.tensor(
                    [loss.item(), batch.trained_tokens], dtype=torch.float64, device=context.device
                )
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1].clamp(min=1))


def require_finite(report: StepReport, loss_is_scaled: bool) -> None:
    """Refuse to go on with a loss or a gradient that is not finite.

    DeepSpeed skips such a step in most number formats and says nothing. Only where the loss is scaled is that
    part of training: the scale was too high, and the skipped step has lowered it.

    Args:
        report: The step that is over.
        loss_is_scaled: Whether a skipped step is to be expected now and then.

    Raises:
        TrainingError: Names the step and what to try.
    """
    if math.isfinite(report.loss) and math.isfinite(report.gradient_norm):
        return
    if not (report.skipped and loss_is_scaled):
        raise TrainingError(
            f"loss={report.loss} and gradient_norm={report.gradient_norm:.3g} at step {report.step}, with "
            f"learning_rate={report.learning_rate:.3g}: not a number, so no later step can be right; "
            "lower optim.lr or raise optim.warmup_ratio, look at the data of this step, and start again from "
            "the last checkpoint"
        )


def is_due(every_steps: int | None, done: int, steps: int) -> bool:
    """Tell whether something happens after a step: at the end, and every so many steps before it."""
    return done == steps or (every_steps is not None and done % every_steps == 0)
