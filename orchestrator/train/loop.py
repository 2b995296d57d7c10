"""The training loop of one worker.

Read `train` first. Its arguments hold every decision: the engine, the packs of each step, the number of
steps, and the callback.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import distributed as dist

from orchestrator.arch.flops import (
    FrozenWeights,
    Recomputation,
    forward_flops,
    hardware_flops,
    model_flops,
    squares_in_window,
)
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.schema import JobSpec
from orchestrator.data.loader import MicroBatch, PackLoader
from orchestrator.engine.deepspeed_engine import (
    backward,
    end_micro_step,
    gradient_norm,
    seed_step,
    set_learning_rate,
    uses_loss_scaling,
)
from orchestrator.engine.lr_schedule import learning_rate
from orchestrator.engine.step_timer import StepTimer, memory_stats
from orchestrator.engine.train_engine import TrainEngine
from orchestrator.errors import TrainingError
from orchestrator.metrics.meter import RankStep, RankSteps
from orchestrator.model.attention import AttnBackend
from orchestrator.model.loss import ModelInputs, TiledHead, loss_sum
from orchestrator.parallel.parallel_dims import ParallelDims
from orchestrator.parallel.ulysses import SequenceGroup


@dataclass(frozen=True)
class TrainContext:
    """What one worker needs for the whole run.

    Attributes:
        job: The job.
        loader: Training packs by step.
        packs: Training packs of all steps together; later slots are empty.
        steps: Optimizer steps.
        evaluation: Evaluation packs by step, and their number, for each evaluation set by name.
        rank: Rank of this worker.
        layout: Degrees of parallelism; say which packs, and which part of them, this worker reads.
        sequence: Process group of the workers that share each sequence; None without sequence parallelism.
        device: Device of the model.
        attn_backend: How attention is computed.
        shape: For FLOPs; None leaves them out.
        head: The LM head, where it scores labels by tiles.
        num_adapter_params: Number of LoRA parameters, for FLOPs.
        adapts_last_matmul: Whether the last matmul of a layer has an adapter.
    """

    job: JobSpec
    loader: PackLoader
    packs: int
    steps: int
    evaluation: Mapping[str, tuple[PackLoader, int]]
    rank: int
    layout: ParallelDims
    sequence: SequenceGroup | None
    device: torch.device
    attn_backend: AttnBackend
    shape: ModelDims | None
    head: TiledHead | None = None
    num_adapter_params: int = 0
    adapts_last_matmul: bool = False

    def batches(self, loader: PackLoader, step: int, packs: int) -> Iterator[MicroBatch]:
        """Yield this worker's micro-batches of a step, each with its part of the sequence."""
        layout = self.layout
        return loader.micro_batches(
            step, layout.data_parallel_rank(self.rank), packs, layout.sequence_rank(self.rank)
        )

    def inputs(self, batch: MicroBatch) -> ModelInputs:
        """Return the model inputs of a micro-batch."""
        return ModelInputs.from_batch(batch, self.attn_backend, self.device, self.sequence)


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
    """Called by `train` at the end of steps, after evaluations and to save."""

    @property
    def stop_requested(self) -> bool:
        """Whether this rank has seen a stop request; one rank is enough to stop all."""

    def on_step_end(self, report: StepReport) -> None:
        """Handle a finished step."""

    def on_evaluate(self, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        """Handle the evaluation loss over all sets, and that of each set by name."""

    def on_save(self, engine: TrainEngine, step: int) -> None:
        """Save a checkpoint; all ranks call it at the same step."""


def train(engine: TrainEngine, context: TrainContext, callback: Callback, start_step: int = 0) -> None:
    """Train from a step to the end, or until a stop is requested; then all ranks save the same step.

    Args:
        engine: The DeepSpeed engine, in the state after `start_step` steps.
        context: The run.
        callback: Called after every step; saves checkpoints.
        start_step: Steps that are already done.

    Raises:
        TrainingError: The loss or the gradient norm is not finite.
    """
    job = context.job
    timer = StepTimer(context.device)
    for step in range(start_step, context.steps):
        rate = learning_rate(job.optim, step, context.steps)
        set_learning_rate(engine, rate, rate * (job.optim.muon_lr or 0.0) / job.optim.lr)
        seed_step(job.run.seed, step, context.rank)
        mine = run_step(engine, context, step, timer)
        ranks, is_stopped = gather(mine, context.device, callback.stop_requested)
        done = step + 1
        report = StepReport(
            step=done,
            epoch=context.loader.epoch(done, context.packs),
            seconds=timer.lap(),
            learning_rate=rate,
            gradient_norm=gradient_norm(engine),
            skipped=not engine.was_step_applied(),
            ranks=ranks,
        )
        callback.on_step_end(report)
        require_finite(report, uses_loss_scaling(engine))
        is_stopped = is_stopped and done < context.steps
        if is_stopped:  # the grace period may be too short for an evaluation
            callback.on_save(engine, done)
        if job.eval and is_due(job.eval.every_steps, done, context.steps):
            callback.on_evaluate(done, *evaluate(engine, context))
        if is_stopped:
            return
        if is_due(job.checkpoint.every_steps, done, context.steps):
            callback.on_save(engine, done)
        timer.restart()


def run_step(engine: TrainEngine, context: TrainContext, step: int, timer: StepTimer) -> RankStep:
    """Run forward, backward and optimizer step over this worker's micro-batches of one step."""
    batches = context.batches(context.loader, step, context.packs)
    step_tokens = max(1, context.loader.trained_tokens(step, context.packs))
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    work = []
    for _ in range(context.job.gradient_accumulation_steps):
        with timer.phase("data"):
            batch = next(batches)
            inputs = context.inputs(batch)
        with timer.phase("forward"):
            loss = loss_sum(engine, inputs, context.head)
        with timer.phase("backward"):
            backward(engine, loss / step_tokens, context.layout.gradient_divisor)
        with timer.phase("optimizer"):
            end_micro_step(engine)
        total += loss.detach()
        work.append(batch)
    return measure(context, work, total.item(), timer)


def measure(context: TrainContext, work: Sequence[MicroBatch], loss: float, timer: StepTimer) -> RankStep:
    """Return this rank's tokens, FLOPs, phase times and memory of a step."""
    model_work = hardware_work = 0.0
    if context.shape is not None:
        model, layout, method = context.job.model, context.layout, context.job.method
        frozen = FrozenWeights(method.type == "lora", method.type == "lora" and not method.train_embeddings)
        for batch in work:
            windowed = squares_in_window(batch.real_lengths, context.shape.window)
            forward = forward_flops(
                context.shape,
                batch.tokens,
                batch.square_tokens,
                batch.trained_tokens,
                windowed / layout.sequence_parallel_size,
                context.num_adapter_params,
            )
            again = Recomputation(
                model.gradient_checkpointing,
                context.job.parallel.zero_stage,
                tiled_head=context.head is not None,
                mlp_tiles=-(-len(batch.input_ids) // model.mlp_tile_tokens) if model.mlp_tile_tokens else 0,
                adapts_last_matmul=context.adapts_last_matmul,
            )
            model_work += model_flops(forward, frozen)
            hardware_work += hardware_flops(forward, again, frozen)
    phases = timer.phase_seconds()
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
        **memory_stats(context.device),
    )


def gather(mine: RankStep, device: torch.device, stop_requested: bool) -> tuple[RankSteps, bool]:
    """Return the metrics of every rank, and whether any rank has seen a stop request.

    One all-gather a step, of shape (world_size, metrics + 1); it is also the barrier that ends the step.
    """
    vector = torch.tensor([*mine.vector(), float(stop_requested)], dtype=torch.float64, device=device)
    everyone = vector.new_empty(dist.get_world_size() * len(vector))
    dist.all_gather_into_tensor(everyone, vector)
    rows = everyone.view(-1, len(vector)).cpu().numpy()
    return RankSteps(rows[:, :-1]), bool(rows[:, -1].any())


def evaluate(engine: TrainEngine, context: TrainContext) -> tuple[float, dict[str, float]]:
    """Return the mean cross-entropy over the trained tokens of all evaluation sets, and of each by name."""
    # Loss and trained tokens of each set, [sets, 2].
    totals = torch.zeros(len(context.evaluation), 2, dtype=torch.float64, device=context.device)
    engine.eval()
    with torch.no_grad():
        for total, (loader, packs) in zip(totals, context.evaluation.values(), strict=True):
            for step in range(loader.steps(1.0)):
                for batch in context.batches(loader, step, packs):
                    loss = loss_sum(engine, context.inputs(batch), context.head)
                    total += torch.tensor(
                        [loss.item(), batch.trained_tokens], dtype=torch.float64, device=context.device
                    )
    engine.train()
    dist.all_reduce(totals)
    together = totals.sum(0)
    losses = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
    return float(together[0] / together[1].clamp(min=1)), dict(zip(context.evaluation, losses, strict=True))


def require_finite(report: StepReport, loss_is_scaled: bool) -> None:
    """Stop if the loss or the gradient norm is not finite.

    DeepSpeed skips such a step without a message in most dtypes. With dynamic loss scaling (fp16) a skipped
    step is normal: the scale was too high, and skipping lowers it.

    Args:
        report: The finished step.
        loss_is_scaled: Whether the loss is scaled, so that a skipped step is normal.

    Raises:
        TrainingError: Names the step and what to try.
    """
    if math.isfinite(report.loss) and math.isfinite(report.gradient_norm):
        return
    if not (report.skipped and loss_is_scaled):
        raise TrainingError(
            f"loss={report.loss} and gradient_norm={report.gradient_norm:.3g} at step {report.step}, with "
            f"learning_rate={report.learning_rate:.3g}: not finite; lower optim.lr or raise "
            "optim.warmup_ratio, check the data of this step, and resume from the last checkpoint"
        )


def is_due(every_steps: int | None, done: int, steps: int) -> bool:
    """Return whether an action is due after a step: at the end, and at every multiple of `every_steps`."""
    return done == steps or (every_steps is not None and done % every_steps == 0)
