"""Saves checkpoints with one topology and loads them with another.

    python -m tests.invariant.topologies               every pair of topologies, for each kind of training
    python -m tests.invariant.topologies --sample 100  a hundred random ones

`test_topologies.py` runs a pairwise cover of the same transfers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from allpairspy import AllPairs

from orchestrator.checkpoint.manifest import read_manifest
from orchestrator.checkpoint.tensor_reader import TensorReader
from orchestrator.config.validation import broken_rules
from tests.invariant import choices, material
from tests.invariant.group import Outcome, run_group

STEPS, SAVED_AT = 4, 2
PACKS_OF_A_STEP = 12
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-3}
"""Largest relative difference of a loss; that of bf16 is as large between two undisturbed runs."""
AXES: dict[str, tuple[Any, ...]] = {
    "workers": (1, 2, 3, 4),
    "zero_stage": (0, 1, 2, 3),
    "sequence_parallel_size": (1, 2),
    "offload": ("none", "optimizer", "all"),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "muon": {"optimizer": "muon", "muon_lr": 0.01},
    "paged": {"optimizer": "paged_adamw"},
    "8-bit": {"optimizer": "adamw_8bit"},
    "tied": {},
    "lora": {"method": choices.LORA},
    "embeddings": {"method": {**choices.LORA, "train_embeddings": True}},
    "nf4": {"method": {**choices.LORA, "quantization": "nf4"}},
}
"""Fields of the job for each kind of training."""
ANY = tuple(kind for kind in KINDS if kind != "8-bit")
"""Kinds whose state fits any topology."""
_OFFLOAD = {
    "none": {},
    "optimizer": {"offload_optimizer": "cpu"},
    "all": {"offload_optimizer": "cpu", "offload_param": "cpu"},
}


@dataclass(frozen=True)
class Topology:
    """The workers of a run and what they share out."""

    workers: int
    zero_stage: int
    sequence_parallel_size: int
    offload: str

    def __str__(self) -> str:
        return f"{self.workers}w-zero{self.zero_stage}-sp{self.sequence_parallel_size}-{self.offload}"


@dataclass(frozen=True)
class Transfer:
    """A checkpoint of one topology that is loaded with another."""

    kind: str
    saved: Topology
    loaded: Topology

    def __str__(self) -> str:
        return f"{self.kind}: {self.saved} to {self.loaded}"


def document_of(kind: str, topology: Topology, home: Path) -> dict[str, Any]:
    """Return the job document of a run."""
    parallel = {
        "zero_stage": topology.zero_stage,
        "sequence_parallel_size": topology.sequence_parallel_size,
        **_OFFLOAD[topology.offload],
    }
    model = home / ("tied" if kind == "tied" else "model")
    return material.job(
        model, topology.workers, parallel, max_steps=STEPS, global_batch_size=PACKS_OF_A_STEP,
        warmup_ratio=0.0, checkpoint={"every_steps": SAVED_AT}, **KINDS[kind],
    )  # fmt: skip


@cache
def topologies(kind: str) -> list[Topology]:
    """Return the topologies that the rules of the job allow for a kind of training."""
    found = []
    for values in product(*AXES.values()):
        topology = Topology(*values)
        if topology.workers % topology.sequence_parallel_size:
            continue
        job = choices.spec_of(document_of(kind, topology, Path("home")))
        if not any(True for _ in broken_rules(job)):
            found.append(topology)
    return found


def all_transfers() -> list[Transfer]:
    """Return every transfer."""
    return [
        Transfer(kind, saved, loaded)
        for kind in ANY
        for saved, loaded in product(topologies(kind), topologies(kind))
    ]


def cover() -> list[Transfer]:
    """Return transfers in which any two values of saved and loaded topology and kind meet, if they may."""
    axes = [list(ANY), *map(list, AXES.values()), *map(list, AXES.values())]
    size = len(AXES)

    def may_be(row: Sequence[Any]) -> bool:
        kind, *values = row
        return all(
            any(
                all(getattr(each, name) == value for name, value in zip(AXES, part, strict=False))
                for each in topologies(kind)
            )
            for part in (values[:size], values[size:])
        )

    return [
        Transfer(row[0], Topology(*row[1 : 1 + size]), Topology(*row[1 + size :]))
        for row in AllPairs(axes, filter_func=may_be)
    ]


@dataclass(frozen=True)
class Verdict:
    """A transfer and the problems found."""

    transfer: Transfer
    problems: tuple[str, ...]
    loss_error: float
    read_ratio: float


class Bench:
    """Runs transfers in groups by the number of workers; keeps models and documents in one folder."""

    def __init__(self, home: Path) -> None:
        self._home = home
        material.write_model(home / "model")
        material.write_model(home / "tied", tie_word_embeddings=True)
        material.write_documents(home / "documents", 120, seed=3)

    def verdicts(self, transfers: Sequence[Transfer]) -> Iterator[Verdict]:
        """Save what the transfers need, load it, and yield a verdict for each."""
        whole = self.save({(each.kind, each.saved) for each in transfers})
        loads = self.run("loaded", [(each.loaded.workers, self._load(each)) for each in transfers])
        for each in transfers:
            yield self._judge(each, whole[self._name(each.kind, each.saved)], loads[str(each)])

    def save(self, saves: Iterable[tuple[str, Topology]]) -> dict[str, Outcome]:
        """Train and save each kind with a topology."""
        return self.run("saved", ((each.workers, self._save(kind, each)) for kind, each in saves))

    def refuse(self, name: str, saved: tuple[str, Topology], loaded: tuple[str, Topology]) -> dict[str, Any]:
        """Return a task that tries to load what was saved with another kind or topology."""
        checkpoint = self._home / self._name(*saved) / f"step-{SAVED_AT:08d}"
        return self._task(name, *loaded, action="refuse_to_load", checkpoints=[str(checkpoint)])

    def run(self, stage: str, tasks: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Outcome]:
        """Run tasks in a group for each number of workers; return the outcomes by name."""
        by_size: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for workers, task in tasks:
            by_size[workers].append(task)
        outcomes: dict[str, Outcome] = {}
        for workers, of_size in sorted(by_size.items()):
            limit = 120 + 10 * workers * len(of_size)
            outcomes |= run_group(self._home / f"{stage}-{workers}", workers, of_size, limit)
        return outcomes

    def _task(self, name: str, kind: str, topology: Topology, **more: Any) -> dict[str, Any]:
        document = document_of(kind, topology, self._home)
        return {
            "name": name,
            "action": "train",
            "job": document,
            "data": str(self._home / "documents"),
            "dtype": document["model"].get("dtype", "fp32"),
            "newton_schulz": "fp32",
            **more,
        }

    def _name(self, kind: str, topology: Topology) -> str:
        return f"{kind} {topology}"

    def _save(self, kind: str, topology: Topology) -> dict[str, Any]:
        name = self._name(kind, topology)
        return self._task(name, kind, topology, save_to=str(self._home / name))

    def _load(self, transfer: Transfer) -> dict[str, Any]:
        saved = self._home / self._name(transfer.kind, transfer.saved) / f"step-{SAVED_AT:08d}"
        more = {"resume": str(saved), "save_again_to": str(self._home / str(transfer))}
        return self._task(str(transfer), transfer.kind, transfer.loaded, **more)

    def _judge(self, transfer: Transfer, whole: Outcome, loaded: Outcome) -> Verdict:
        steps = [step["loss"] for step in whole.answer["steps"][SAVED_AT:]]
        resumed = [step["loss"] for step in loaded.answer["steps"]]
        error = max((abs(a - b) / a for a, b in zip(steps, resumed, strict=True)), default=1.0)
        before = self._home / self._name(transfer.kind, transfer.saved) / f"step-{SAVED_AT:08d}"
        after = self._home / str(transfer) / f"step-{SAVED_AT:08d}"
        problems = list(differences(before, after))
        dtype = KINDS[transfer.kind].get("model", {}).get("dtype", "fp32")
        if not error <= TOLERANCES[dtype]:
            problems.append(f"losses differ by {error:.1e}")
        ratio = max(answer["bytes_read"] / answer["bytes_held"] for answer in loaded.ranks)
        return Verdict(transfer, tuple(problems), error, ratio)


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield a text for each tensor of two checkpoints that is not equal to the bit."""
    old, new = read_manifest(before), read_manifest(after)
    if old["tensors"].keys() != new["tensors"].keys():
        yield f"other tensors: {sorted(old['tensors'].keys() ^ new['tensors'].keys())[:5]}"
        return
    reader, other = TensorReader(before, old), TensorReader(after, new)
    for name in old["tensors"]:
        one, two = reader.tensor(name), other.tensor(name)
        if one.shape != two.shape or not torch.equal(one.view(-1), two.view(-1)):
            yield f"{name} of shape {list(one.shape)} is not equal to the bit"


def main() -> int:
    """Run transfers and print the verdicts; return 1 if there are problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="number of random transfers; all without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = all_transfers()
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    bad = 0
    with tempfile.TemporaryDirectory() as home:
        verdicts = list(Bench(Path(home)).verdicts(chosen))
    for verdict in verdicts:
        bad += bool(verdict.problems)
        what = "; ".join(verdict.problems[:3]) or f"losses within {verdict.loss_error:.1e}"
        sys.stdout.write(f"{verdict.transfer}: {what}\n")
    worst = {
        "transfers": len(verdicts),
        "with problems": bad,
        "largest loss error": max(each.loss_error for each in verdicts),
        "most bytes read per byte held": max(each.read_ratio for each in verdicts),
    }
    sys.stdout.write(json.dumps(worst, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
