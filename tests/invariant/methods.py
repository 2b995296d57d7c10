"""Trains allowed combinations of `choices.py` with two workers, and compares them with a single process.

    python -m tests.invariant.methods --sample 200 --seed 1    200 random combinations

`test_methods.py` runs a pairwise cover of the same combinations.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.config.schema import JobSpec
from orchestrator.export.export import fp32_weights
from orchestrator.model.quantization import disable_cpu_repacking, patch_dora, quantization_config
from tests.invariant import choices, material, reference
from tests.invariant.choices import STEPS, WORKERS, Choice
from tests.invariant.group import Outcome, has_outcome, outcome_of, run_group

LIMITS = {
    "fp32": {"first loss": 1e-5, "loss": 1e-4, "gradient norm": 1e-4},
    "fp16": {"first loss": 1e-2, "loss": 2e-2, "gradient norm": 2e-2},
    "bf16": {"first loss": 2e-2, "loss": 5e-2, "gradient norm": 5e-2},
}
"""Largest relative errors by dtype: of the loss before the first update, of the losses after it and of the
evaluation, and of the norm of the first gradient."""
LIMIT_OF_8_BITS = 2e-3
"""Minimum limit for losses after an update by an 8-bit optimizer, and with int8 weights: on CPU these
quantize activations only in evaluation mode, and the reference evaluates in training mode."""
TRAINED = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".modules_to_save.")
CHOICES_IN_A_GROUP = 40


@dataclass(frozen=True)
class Verdict:
    """Relative errors of a choice by kind, and the problems found."""

    choice: Choice
    errors: dict[str, float]
    problems: tuple[str, ...]


class Bench:
    """Trains choices and compares them with the reference; keeps model and documents in one folder."""

    def __init__(self, home: Path) -> None:
        self.model = home / "model"
        self._home = home
        self._groups = 0
        self._references: dict[str, reference.Reference] = {}
        material.write_model(self.model)
        material.write_documents(home / "documents", 12, seed=1)
        material.write_documents(home / "held-out", 4, seed=2)

    def verdicts(self, chosen: Iterable[Choice]) -> Iterator[Verdict]:
        """Train choices in groups, and yield a verdict for each."""
        every = list(chosen)
        for start in range(0, len(every), CHOICES_IN_A_GROUP):
            yield from self._run(every[start : start + CHOICES_IN_A_GROUP])

    def _run(self, chosen: Sequence[Choice]) -> Iterator[Verdict]:
        """Train choices in one group; after a failing or hanging one, continue in a new group."""
        folder = self._home / f"group-{self._groups}"
        self._groups += 1
        failure = ""
        try:
            run_group(folder, WORKERS, [self._task(choice) for choice in chosen], 120 + 4 * len(chosen))
        except AssertionError as error:
            failure = str(error)
        done = [has_outcome(folder, name_of(choice), WORKERS) for choice in chosen]
        # If the group fails after its last task, that task counts as failed.
        finished = [*done[:-1], False].index(False) if failure else len(chosen)
        for choice in chosen[:finished]:
            yield self._judge(choice, outcome_of(folder, name_of(choice), WORKERS))
        if finished < len(chosen):
            yield Verdict(chosen[finished], {}, (failure,))
            if chosen[finished + 1 :]:
                yield from self._run(chosen[finished + 1 :])

    def _task(self, choice: Choice) -> dict[str, Any]:
        document = choices.document_of(choice, self.model)
        return {
            "name": name_of(choice),
            "action": "train",
            "job": document,
            "dtype": document["model"]["dtype"],
            "newton_schulz": "fp32",
            "fp16": {"initial_scale_power": 8},
            "data": str(self._home / "documents"),
            "held_out": str(self._home / "held-out"),
            "initial": True,
            "parameters": True,
            "save_to": str(self._home / "checkpoints" / name_of(choice)),
        }

    def _reference(self, choice: Choice) -> reference.Reference:
        """Return the cached single-process result, which is independent of ZeRO, offloading and dtype."""
        job = choices.spec_of(choices.document_of(choice, self.model))
        optimizer = "muon" if job.optim.optimizer == "muon" else "adamw"
        key = f"{job.method} {optimizer} {job.data.packing}"
        if key not in self._references:
            changed = choices.document_of(choice, self.model)
            with reference.muon_in_fp32() if optimizer == "muon" else nullcontext():
                self._references[key] = reference.train(
                    changed,
                    self._home / "documents",
                    self._home / "held-out",
                    lambda model: plain(model, job),
                )
        return self._references[key]

    def _judge(self, choice: Choice, outcome: Outcome) -> Verdict:
        job = choices.spec_of(choices.document_of(choice, self.model))
        expected, steps = self._reference(choice), outcome.answer["steps"]
        evaluation = outcome.answer["evaluations"][-1][1] if outcome.answer["evaluations"] else math.nan
        found = [step["loss"] for step in steps]
        errors = {
            "first loss": _off(found[:1], expected.losses[:1]),
            "loss": _off([*found[1:], evaluation], [*expected.losses[1:], expected.evaluation]),
            "gradient norm": _off([step["gradient_norm"] for step in steps[:1]], expected.gradient_norms[:1]),
        }
        limits = dict(LIMITS[job.model.dtype])
        if job.method.quantization == "int8" or "8bit" in job.optim.optimizer:
            limits["loss"] = max(limits["loss"], LIMIT_OF_8_BITS)
        problems = [
            f"{kind} is off by {error:.2e}, and {limits[kind]:.0e} is allowed"
            for kind, error in errors.items()
            if not error <= limits[kind]  # true for NaN as well
        ]
        problems += outcome.answer.get("problems", [])
        if any(step["skipped"] for step in steps):
            problems.append("a step was skipped")
        problems += self._problems_of_weights(choice, outcome)
        return Verdict(choice, errors, tuple(problems))

    def _problems_of_weights(self, choice: Choice, outcome: Outcome) -> list[str]:
        """Return the problems of weights and checkpoint.

        Every trainable weight must have changed, every frozen one must be bitwise equal, and the checkpoint
        must hold the trained weights.
        """
        before, after = outcome.kind("initial"), outcome.kind("parameter")
        changed = {name for name in after if after[name].tobytes() != before[name].tobytes()}
        wanted = {name for name in after if "full" in choice or any(mark in name for mark in TRAINED)}
        if changed != wanted:
            return [f"did not change: {wanted - changed}; changed though frozen: {changed - wanted}"]
        saved = self._home / "checkpoints" / name_of(choice) / f"step-{STEPS:08d}"
        try:
            weights = fp32_weights(saved)
            found = {name: weights[name].contiguous().detach().float().numpy() for name in wanted}
            # The run's weights are rounded to its dtype, the checkpoint holds fp32.
            off = [name for name in wanted if not np.allclose(found[name], after[name], 1e-2, 1e-5)]
        except Exception as error:
            return [f"the checkpoint cannot be read: {error!r}"]
        return [f"{name} of the checkpoint is not what was trained" for name in off]


def name_of(choice: Choice) -> str:
    """Return the name of a choice, which is also used for its files."""
    return "-".join(choice)


def plain(model: Any, job: JobSpec) -> Any:
    """Return the model for a job's method, built with transformers and peft only."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    method = job.method
    if method.type == "full":
        return model
    if method.quantization != "none":
        model = AutoModelForCausalLM.from_pretrained(
            job.model.path, attn_implementation="eager", dtype=torch.float32,
            quantization_config=quantization_config(method, torch.float32),
        )  # fmt: skip
        disable_cpu_repacking(model)
    torch.manual_seed(job.run.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=method.rank, lora_alpha=method.alpha, target_modules="all-linear",
        use_rslora=method.use_rslora, use_dora=method.use_dora,
        modules_to_save=["embed_tokens", "lm_head"] if method.train_embeddings else None,
    )  # fmt: skip
    adapted = get_peft_model(model, config).train()
    patch_dora(adapted)
    return adapted


def _off(found: Sequence[float], expected: Sequence[float | None]) -> float:
    """Return the largest relative error, or NaN if one is NaN or a value is missing."""
    if len(found) != len(expected):
        return math.nan
    errors = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True) if other]
    return max(errors, key=lambda error: (error != error, error))


def main(arguments: Sequence[str]) -> int:
    """Train the choices that the arguments select; return 1 if one fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.invariant.methods", description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(arguments)
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        every = choices.allowed(bench.model)
        drawn = random.Random(options.seed).sample(every, min(options.sample, len(every)))
        for verdict in bench.verdicts(drawn):
            failed += bool(verdict.problems)
            for problem in verdict.problems:
                sys.stdout.write(f"FAILED {name_of(verdict.choice)}: {problem}\n")
            sys.stdout.flush()
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(f"{len(drawn)} of {len(every)} allowed, {failed} failed, {minutes:.1f} minutes\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
