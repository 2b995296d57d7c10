"""Values that are allowed and out of all custom: a slip more often than a wish, so each gives a warning.

The limits are meant to be far outside what anybody publishes, so that a warning is almost never wrong; what
they are taken from stands beside each.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checks.inputs import is_hub_name
from orchestrator.checks.models import text_config, whole
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import Problem
from orchestrator.data.sources import looks_like_hub_name

# Whole pretrained models are fine-tuned with 1e-6 to 1e-4 (Llama 2 and Alpaca: 2e-5) and trained from
# scratch with up to 1e-3 (Pythia's small ones; GPT-3 6e-5 to 6e-4), LoRA with up to 5e-4 (arXiv 2106.09685).
# Each limit is at least ten times the largest of these.
_HIGHEST_LR = {"pretrained": 1e-3, "random": 1e-2, "lora": 1e-2}
_LOWEST_LR = 1e-8
_HIGHEST_MUON_LR = 0.5  # 0.02 is customary, in units of a step's singular values
_LONGEST_WARMUP = 0.5
_MOST_EPOCHS = 50  # 1 to 5 are customary, 15 in LIMA (arXiv 2305.11206)
_HIGHEST_WEIGHT_DECAY = 1.0  # 0 to 0.1 are customary
_HIGHEST_CLIP_NORM = 1000.0
_HIGHEST_DROPOUT = 0.5  # 0 to 0.1 are customary
_LARGEST_RANK = 1024
_SCALES = (0.01, 64.0)  # alpha / rank; 0.25 (QLoRA, arXiv 2305.14314) to 2 are customary
_SHORTEST_PACK = 64  # Alpaca's prompt alone takes some 50 tokens
_LARGEST_BATCH_TOKENS = 64 * 2**20  # Llama 3 405B was pretrained with 16 Mi tokens a step
_LONG_RUN_STEPS = 1000


def unusual(job: JobSpec) -> Iterator[Problem]:
    """Yield the values of a job that are allowed and out of all custom.

    Args:
        job: A valid job.

    Yields:
        The fields concerned, and one sentence with value, custom and remedy.
    """
    yield from _learning_rates(job)
    yield from _optimization(job)
    yield from _adapters(job)
    yield from _lengths(job)
    yield from _saving(job)
    yield from _evaluation(job)
    yield from _paths(job)


def unusual_here(job: JobSpec) -> Iterator[Problem]:
    """Yield what `unusual` does, and what a run says itself once it has read the model's configuration."""
    yield from unusual(job)
    limit = whole(text_config(job.model.path), "max_position_embeddings")
    if limit and job.data.max_length > limit:
        yield (
            ("data.max_length", "model.path"),
            f"data.max_length={job.data.max_length} is above max_position_embeddings={limit} of the model, "
            "which may not have seen such distances",
        )
    for name in (name for name, value in job.run.env.items() if value is None and name not in os.environ):
        yield (
            (f"run.env.{name}",),
            f"run.env.{name} is null, which takes the value from where the command runs, and it is not "
            "set here; export it before, or it is refused",
        )


def _learning_rates(job: JobSpec) -> Iterator[Problem]:
    optim = job.optim
    kind = "lora" if job.method.type == "lora" else job.model.weights
    what = {"lora": "LoRA", "pretrained": "pretrained weights", "random": "random weights"}[kind]
    if optim.lr > _HIGHEST_LR[kind]:
        yield (
            ("optim.lr",),
            f"optim.lr={optim.lr:g} is far above what is customary for {what} (below {_HIGHEST_LR[kind]:g}), "
            "and the loss will most likely diverge; check the exponent",
        )
    elif optim.lr < _LOWEST_LR:
        yield ("optim.lr",), f"optim.lr={optim.lr:g} is so small that nothing is learnt; check the exponent"
    if optim.muon_lr is not None and optim.muon_lr > _HIGHEST_MUON_LR:
        yield (
            ("optim.muon_lr",),
            f"optim.muon_lr={optim.muon_lr:g} is far above what is customary (0.02); check the exponent",
        )


def _optimization(job: JobSpec) -> Iterator[Problem]:
    optim = job.optim
    if optim.warmup_ratio > _LONGEST_WARMUP:
        yield (
            ("optim.warmup_ratio",),
            f"optim.warmup_ratio={optim.warmup_ratio:g} keeps the learning rate below optim.lr for that "
            "share of all steps; 0.03 is customary, and it is no number of steps",
        )
    if optim.max_steps is None and optim.epochs > _MOST_EPOCHS:
        yield (
            ("optim.epochs",),
            f"optim.epochs={optim.epochs:g} reads all data that often, until they are known by heart; 1 to 5 "
            "are customary",
        )
    if optim.weight_decay >= _HIGHEST_WEIGHT_DECAY:
        yield (
            ("optim.weight_decay",),
            f"optim.weight_decay={optim.weight_decay:g} is decoupled, and 0 to 0.1 are customary; lower it",
        )
    if optim.max_grad_norm > _HIGHEST_CLIP_NORM:
        yield (
            ("optim.max_grad_norm",),
            f"optim.max_grad_norm={optim.max_grad_norm:g} never clips; the usual value is 1, and 0 "
            "turns clipping off",
        )
    first, second = optim.betas
    if first >= math.sqrt(second) and first > 0.0:  # the bound of Adam's convergence, arXiv 2208.09632
        yield (
            ("optim.betas",),
            f"optim.betas=[{first:g}, {second:g}] lets the first moment outlive the second, and Adam can "
            "diverge where the first is not below the root of the second; use [0.9, 0.999] or [0.9, 0.95]",
        )


def _adapters(job: JobSpec) -> Iterator[Problem]:
    method = job.method
    if method.type != "lora":
        return
    width = whole(text_config(job.model.path), "hidden_size")
    if method.rank > (width or _LARGEST_RANK):
        than = f"the model's width of {width}" if width else "the widths at which adapters save memory"
        yield (
            ("method.rank",),
            f"method.rank={method.rank} is above {than}, so adapters are larger than what they adapt; lower "
            "it, or use method.type: full",
        )
    scale = method.alpha / (math.sqrt(method.rank) if method.use_rslora else method.rank)
    if not _SCALES[0] <= scale <= _SCALES[1]:
        yield (
            ("method.alpha", "method.rank"),
            f"method.alpha={method.alpha:g} with method.rank={method.rank} multiplies adapters by {scale:g}; "
            "0.25 to 2 are customary, as with an alpha of twice the rank",
        )
    if method.dropout > _HIGHEST_DROPOUT:
        yield (
            ("method.dropout",),
            f"method.dropout={method.dropout:g} drops more than half of what adapters see; 0 to 0.1 are "
            "customary",
        )


def _lengths(job: JobSpec) -> Iterator[Problem]:
    length, batch = job.data.max_length, job.optim.global_batch_size
    if length < _SHORTEST_PACK:
        yield (
            ("data.max_length",),
            f"data.max_length={length} is in tokens, and few prompts with their answers are as short; most "
            "rows will be cut or dropped",
        )
    if length * batch > _LARGEST_BATCH_TOKENS:
        yield (
            ("optim.global_batch_size", "data.max_length"),
            f"optim.global_batch_size={batch} packs of {length} tokens are {length * batch:,} tokens in one "
            f"step, more than the largest models are pretrained with; it counts packs, not tokens",
        )


def _saving(job: JobSpec) -> Iterator[Problem]:
    steps, every = job.optim.max_steps, job.checkpoint.every_steps
    if steps is None:
        return
    if every is None and steps >= _LONG_RUN_STEPS:
        yield (
            ("checkpoint.every_steps", "optim.max_steps"),
            f"checkpoint.every_steps=null saves only at the end of {steps} steps, so a failure loses all of "
            f"them; set it, for example to {steps // 10}",
        )
    if every is not None and every > steps:
        yield (
            ("checkpoint.every_steps", "optim.max_steps"),
            f"checkpoint.every_steps={every} is above optim.max_steps={steps}, so only the end is saved",
        )


def _evaluation(job: JobSpec) -> Iterator[Problem]:
    if job.eval is None:
        return
    steps, every = job.optim.max_steps, job.eval.every_steps
    if steps is not None and every is not None and every > steps:
        yield (
            ("eval.every_steps", "optim.max_steps"),
            f"eval.every_steps={every} is above optim.max_steps={steps}, so only the end is evaluated",
        )
    for number, held_out in enumerate(job.eval.data):
        same = next((source for source in job.data.train if _reads(source, held_out)), None)
        if same is not None:
            yield (
                (f"eval.data.{number}.path", f"eval.data.{number}"),
                f"eval.data {held_out.path} is also trained on (data.train {same.path}), so its loss says "
                "nothing of other data; hold some rows out in a file of their own",
            )


def _reads(training: SourceSpec, held_out: SourceSpec) -> bool:
    """Tell whether training reads the rows that are held out: the same file or data set, or its folder."""
    if (training.split, training.subset, training.revision) != (
        held_out.split, held_out.subset, held_out.revision,
    ):  # fmt: skip
        return False
    here, there = resolve(training.path), resolve(held_out.path)
    if not (here.exists() and there.exists()):
        return training.path == held_out.path
    real, other = Path(os.path.realpath(here)), Path(os.path.realpath(there))
    return other.is_relative_to(real) or (other.is_dir() and real.is_relative_to(other))


def _paths(job: JobSpec) -> Iterator[Problem]:
    """Warn of names of the hub that are more likely a path with a slip in it."""
    named = [
        ("model.path", job.model.path, is_hub_name(job.model.path) and not resolve(job.model.path).exists())
    ]
    groups = (("data.train", job.data.train), ("eval.data", job.eval.data if job.eval else ()))
    for field, sources in groups:
        named += [
            (f"{field}.{number}.path", source.path, looks_like_hub_name(source.path))
            for number, source in enumerate(sources)
        ]
    for field, path, on_the_hub in named:
        if on_the_hub and (near := _near(path)):
            yield (field,), f"{field}={path} is taken for a name on the hub; {near}"


def _near(path: str) -> str | None:
    """Return what lies here under a name like that of the hub, or None."""
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
        return f"did you mean {folder / close[0]}, which is here?"
    return f"the folder {first} is here and has no {rest}; check the path" if rest else None
