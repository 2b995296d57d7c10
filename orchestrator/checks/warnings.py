"""Warnings about unusual values of a job, which are valid but most likely mistakes.

Each limit is far outside of published settings, so that false warnings are rare; comments give the sources.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checks.inputs import is_hub_name
from orchestrator.checks.models import positive_int, text_config
from orchestrator.config.eval_sets import all_sources, eval_sources
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import Problem
from orchestrator.data.sources import looks_like_hub_name

# Published learning rates: 1e-6 to 1e-4 for full fine-tuning (Llama 2 and Alpaca: 2e-5), up to 1e-3 from
# scratch (small Pythia models; GPT-3 6e-5 to 6e-4), up to 5e-4 for LoRA (arXiv 2106.09685).
# Each limit is at least ten times the largest of these.
_HIGHEST_LR = {"pretrained": 1e-3, "random": 1e-2, "lora": 1e-2}
_LOWEST_LR = 1e-8
_HIGHEST_MUON_LR = 0.5  # usual: 0.02, in units of the update's singular values
_LONGEST_WARMUP = 0.5
_MOST_EPOCHS = 50  # usual: 1 to 5; LIMA: 15 (arXiv 2305.11206)
_HIGHEST_WEIGHT_DECAY = 1.0  # usual: 0 to 0.1
_HIGHEST_GRAD_NORM = 1000.0
_HIGHEST_DROPOUT = 0.5  # usual: 0 to 0.1
_LARGEST_RANK = 1024
_LORA_SCALES = (0.01, 64.0)  # alpha / rank; usual: 0.25 (QLoRA, arXiv 2305.14314) to 2
_SHORTEST_PACK = 64  # the Alpaca prompt alone has about 50 tokens
_LARGEST_BATCH_TOKENS = 64 * 2**20  # Llama 3 405B was pretrained with 16 Mi tokens per step
_LONG_RUN_STEPS = 1000


def job_warnings(job: JobSpec) -> Iterator[Problem]:
    """Yield a warning for each unusual value of a job.

    Args:
        job: A valid job.

    Yields:
        The fields, and a message with the value, usual values and the remedy.
    """
    yield from _learning_rates(job)
    yield from _optimization(job)
    yield from _adapters(job)
    yield from _lengths(job)
    yield from _saving(job)
    yield from _evaluation(job)
    yield from _paths(job)


def local_warnings(job: JobSpec) -> Iterator[Problem]:
    """Yield `job_warnings`, and warnings about the local model and environment, which `train` logs itself."""
    yield from job_warnings(job)
    limit = positive_int(text_config(job.model.path), "max_position_embeddings")
    if limit and job.data.max_length > limit:
        yield (
            ("data.max_length", "model.path"),
            f"data.max_length={job.data.max_length} is above max_position_embeddings={limit} of the model, "
            "which may not be trained for longer sequences",
        )
    for name in (name for name, value in job.run.env.items() if value is None and name not in os.environ):
        yield (
            (f"run.env.{name}",),
            f"run.env.{name} is null, which takes the value from the environment of the command, and "
            f"{name} is not set here; export it before training, which fails otherwise",
        )


def _learning_rates(job: JobSpec) -> Iterator[Problem]:
    optim = job.optim
    kind = "lora" if job.method.type == "lora" else job.model.weights
    label = {"lora": "LoRA", "pretrained": "pretrained weights", "random": "random weights"}[kind]
    if optim.lr > _HIGHEST_LR[kind]:
        yield (
            ("optim.lr",),
            f"optim.lr={optim.lr:g} is far above usual values for {label} (below {_HIGHEST_LR[kind]:g}), and "
            "the loss will most likely diverge; check the exponent",
        )
    elif optim.lr < _LOWEST_LR:
        yield (
            ("optim.lr",),
            f"optim.lr={optim.lr:g} is too small to change the weights noticeably; check the exponent",
        )
    if optim.muon_lr is not None and optim.muon_lr > _HIGHEST_MUON_LR:
        yield (
            ("optim.muon_lr",),
            f"optim.muon_lr={optim.muon_lr:g} is far above the usual value of 0.02; check the exponent",
        )


def _optimization(job: JobSpec) -> Iterator[Problem]:
    optim = job.optim
    if optim.warmup_ratio > _LONGEST_WARMUP:
        yield (
            ("optim.warmup_ratio",),
            f"optim.warmup_ratio={optim.warmup_ratio:g} is a fraction of all steps, not a number of steps; "
            "the usual value is 0.03",
        )
    if optim.max_steps is None and optim.epochs > _MOST_EPOCHS:
        yield (
            ("optim.epochs",),
            f"optim.epochs={optim.epochs:g} most likely overfits; usual values are 1 to 5",
        )
    if optim.weight_decay >= _HIGHEST_WEIGHT_DECAY:
        yield (
            ("optim.weight_decay",),
            f"optim.weight_decay={optim.weight_decay:g} is decoupled from the gradient; usual values are 0 "
            "to 0.1",
        )
    if optim.max_grad_norm > _HIGHEST_GRAD_NORM:
        yield (
            ("optim.max_grad_norm",),
            f"optim.max_grad_norm={optim.max_grad_norm:g} never clips; the usual value is 1, and 0 "
            "turns clipping off",
        )
    first, second = optim.betas
    if first >= math.sqrt(second) and first > 0.0:  # the bound of Adam's convergence, arXiv 2208.09632
        yield (
            ("optim.betas",),
            f"optim.betas=[{first:g}, {second:g}]: Adam can diverge unless beta1 < sqrt(beta2); use "
            "[0.9, 0.999] or [0.9, 0.95]",
        )


def _adapters(job: JobSpec) -> Iterator[Problem]:
    method = job.method
    if method.type != "lora":
        return
    width = positive_int(text_config(job.model.path), "hidden_size")
    if method.rank > (width or _LARGEST_RANK):
        limit = f"the model's hidden_size of {width}" if width else f"{_LARGEST_RANK}"
        yield (
            ("method.rank",),
            f"method.rank={method.rank} is above {limit}, so adapters save no memory; lower it, or use "
            "method.type: full",
        )
    scale = method.alpha / (math.sqrt(method.rank) if method.use_rslora else method.rank)
    if not _LORA_SCALES[0] <= scale <= _LORA_SCALES[1]:
        yield (
            ("method.alpha", "method.rank"),
            f"method.alpha={method.alpha:g} with method.rank={method.rank} scales adapters by {scale:g}; "
            "usual values are 0.25 to 2, for example alpha: 2 x rank",
        )
    if method.dropout > _HIGHEST_DROPOUT:
        yield (
            ("method.dropout",),
            f"method.dropout={method.dropout:g} drops more than half of the adapter inputs; usual values are "
            "0 to 0.1",
        )


def _lengths(job: JobSpec) -> Iterator[Problem]:
    length, batch = job.data.max_length, job.optim.global_batch_size
    if length < _SHORTEST_PACK:
        yield (
            ("data.max_length",),
            f"data.max_length={length} tokens is shorter than most prompts with their answers, so most rows "
            "are truncated or dropped",
        )
    if length * batch > _LARGEST_BATCH_TOKENS:
        yield (
            ("optim.global_batch_size", "data.max_length"),
            f"optim.global_batch_size={batch} packs of {length} tokens are {length * batch:,} tokens per "
            "step, more than any published pretraining run uses; it counts packs, not tokens",
        )


def _saving(job: JobSpec) -> Iterator[Problem]:
    steps, every = job.optim.max_steps, job.checkpoint.every_steps
    if steps is None:
        return
    if every is None and steps >= _LONG_RUN_STEPS:
        yield (
            ("checkpoint.every_steps", "optim.max_steps"),
            f"checkpoint.every_steps=null saves only after all {steps} steps, so a failure loses the whole "
            f"run; set it, for example to {steps // 10}",
        )
    if every is not None and every > steps:
        yield (
            ("checkpoint.every_steps", "optim.max_steps"),
            f"checkpoint.every_steps={every} is above optim.max_steps={steps}, so it saves only the end",
        )


def _evaluation(job: JobSpec) -> Iterator[Problem]:
    if job.eval is None:
        return
    steps, every = job.optim.max_steps, job.eval.every_steps
    if steps is not None and every is not None and every > steps:
        yield (
            ("eval.every_steps", "optim.max_steps"),
            f"eval.every_steps={every} is above optim.max_steps={steps}, so it evaluates only the end",
        )
    for field, evaluation in eval_sources(job):
        training = next((source for source in job.data.train if _overlaps(source, evaluation)), None)
        if training is not None:
            yield (
                (f"{field}.path", field),
                f"eval.data {evaluation.path} is also trained on (data.train {training.path}), so its loss "
                "does not measure generalization; use eval.share, or put some rows into a separate file",
            )


def _overlaps(training: SourceSpec, evaluation: SourceSpec) -> bool:
    """Return whether training reads rows of an evaluation source: the same file or dataset, or its folder."""
    if (training.split, training.subset, training.revision) != (
        evaluation.split, evaluation.subset, evaluation.revision,
    ):  # fmt: skip
        return False
    train_path, eval_path = resolve(training.path), resolve(evaluation.path)
    if not (train_path.exists() and eval_path.exists()):
        return training.path == evaluation.path
    real_train, real_eval = Path(os.path.realpath(train_path)), Path(os.path.realpath(eval_path))
    return real_eval.is_relative_to(real_train) or (
        real_eval.is_dir() and real_train.is_relative_to(real_eval)
    )


def _paths(job: JobSpec) -> Iterator[Problem]:
    """Yield a warning for each hub name that is more likely a mistyped local path."""
    candidates = [
        ("model.path", job.model.path, is_hub_name(job.model.path) and not resolve(job.model.path).exists())
    ]
    candidates += [
        (f"{field}.path", source.path, looks_like_hub_name(source.path)) for field, source in all_sources(job)
    ]
    for field, path, is_from_hub in candidates:
        if is_from_hub and (suggestion := _local_suggestion(path)):
            yield (field,), f"{field}={path} is read as a hub name; {suggestion}"


def _local_suggestion(path: str) -> str | None:
    """Return a suggestion if a local file or folder has a similar name; None otherwise."""
    first, _, rest = path.partition("/")
    folder = Path(first) if rest else Path()
    if rest and not folder.is_dir():
        return None
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir() or rest]
    except OSError:
        return None
    close = difflib.get_close_matches(rest or first, names, n=1, cutoff=0.75)
    if close:
        return f"did you mean the local path {folder / close[0]}?"
    return f"the local folder {first} has no {rest}; check the path" if rest else None
