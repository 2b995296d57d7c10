"""Compare implementations ("ways") of training steps of a small Llama on packed rows, in a new process.

    python -m tests.benchmarks.step CASE    (started by head.py and attention.py)

A step is forward, backward and AdamW in float32 on two threads, including the preparation of model inputs
from the batch. The ways share model, weights and rows, and alternate; their losses and gradients are compared
before they are timed. Packing of the rows is not included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.balance import BatchShape
from orchestrator.data.corpus import Document, Int64Array
from orchestrator.data.loader import MicroBatch, PackLoader, SamplerConfig
from orchestrator.data.packing import best_fit
from orchestrator.model import attention
from orchestrator.model.loss import ModelInputs, TiledHead, loss_sum
from tests.benchmarks.environment import ROOT, describe, say
from tests.benchmarks.packing import lengths_of

# Attention of the framework (a block mask that transformers builds) or per document; LM head at all positions
# with -100 as ignored label, at labelled positions only, or at these in tiles.
WAYS = {
    "framework": ("sdpa", "all"),
    "framework's attention": ("sdpa", "labelled"),
    "framework's head": (attention.IMPLEMENTATION, "all"),
    "ours": (attention.IMPLEMENTATION, "labelled"),
    "ours, tiled": (attention.IMPLEMENTATION, "tiled"),
}
TILE_TOKENS = 1024
_THREADS = 2
_LOSS_TOLERANCE = 1e-5  # both tolerances are relative
_GRADIENT_TOLERANCE = 1e-4
_ROWS = 4
_WARM_UP_SLOTS = 128
_REPEATED_UP_TO_SECONDS = 45.0
_CPU = torch.device("cpu")
_LEFT_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Case:
    """Parameters of one measurement.

    Attributes:
        vocabulary: Vocabulary size.
        slots: Token positions of a row.
        ways: Names of `WAYS`; the others are compared with the first.
        seconds: Seconds during which steps are repeated; each way runs at least two.
        alone: Measure time and peak memory of one step of the first way, without a comparison.
    """

    vocabulary: int
    slots: int
    ways: tuple[str, ...]
    seconds: float = 60.0
    alone: bool = False


@dataclass(frozen=True)
class Drawn:
    """Documents with Alpaca-like lengths and random tokens; the answer is 20 % to 60 % of each."""

    lengths: Int64Array
    prompts: Int64Array
    vocabulary: int

    @classmethod
    def of(cls, count: int, longest: int, vocabulary: int) -> Drawn:
        lengths = lengths_of("alpaca-like", count).clip(max=longest)
        shares = np.random.default_rng(1).uniform(0.4, 0.8, count)
        return cls(lengths, np.maximum(1, lengths * shares).astype(np.int64), vocabulary)

    @property
    def trained(self) -> Int64Array:
        return self.lengths - self.prompts

    def document(self, number: int) -> Document:
        length = int(self.lengths[number])
        tokens = np.random.default_rng(number).integers(0, self.vocabulary, length).astype(np.uint32)
        return Document(tokens, np.arange(length) >= self.prompts[number])


def rows_of(vocabulary: int, slots: int) -> list[MicroBatch]:
    """Return up to `_ROWS` packed rows of `slots` token positions."""
    documents = Drawn.of(_ROWS * max(1, slots // 100), slots, vocabulary)
    packs = best_fit(documents.lengths, slots, seed=0)
    loader = PackLoader(documents, packs, BatchShape(slots, 1, 1, 1), SamplerConfig(seed=0))
    return [loader.assemble([number]) for number in range(min(_ROWS, len(packs)))]


class Trainer:
    """A Llama with 6 layers and hidden size 256, and its optimizer; runs steps in any of the ways."""

    def __init__(self, vocabulary: int, lr: float) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        attention.register()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=32_768,
            initializer_range=0.05,  # large enough for attention to matter to the loss
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).train()
        self._tiled = TiledHead(self.model, TILE_TOKENS)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def loss(self, way: str, row: MicroBatch) -> Tensor:
        """Return the mean loss of a row's labels."""
        kind, head = WAYS[way]
        self.model.set_attn_implementation(kind)
        if head == "all":
            return self._framework_loss(row, kind)
        total = loss_sum(
            self.model, ModelInputs.from_batch(row, "sdpa", _CPU), self._tiled if head == "tiled" else None
        )
        return total / row.trained_tokens

    def _framework_loss(self, row: MicroBatch, kind: str) -> Tensor:
        labels = np.full(len(row.input_ids), -100)
        labels[row.label_positions + 1] = row.labels  # transformers shifts labels by one position itself
        boundaries = {}
        if kind == attention.IMPLEMENTATION:
            boundaries["documents"] = attention.VarlenMetadata.from_lengths(
                row.document_lengths, "sdpa", _CPU
            )
        loss: Tensor = self.model(
            input_ids=torch.from_numpy(row.input_ids)[None],
            position_ids=torch.from_numpy(row.position_ids)[None],
            labels=torch.from_numpy(labels)[None],
            use_cache=False,  # with a cache, transformers does not detect documents from position_ids
            **boundaries,
        ).loss
        return loss

    def backward(self, way: str, row: MicroBatch) -> float:
        """Zero the gradients, run forward and backward, and return the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss(way, row)
        loss.backward()
        return loss.item()

    def step(self, way: str, row: MicroBatch) -> tuple[float, float]:
        """Run a training step and return its loss and its seconds."""
        started = time.perf_counter()
        loss = self.backward(way, row)
        self._optimizer.step()
        return loss, time.perf_counter() - started


def compare(trainer: Trainer, case: Case, row: MicroBatch) -> dict[str, dict[str, float]]:
    """Return the relative differences of losses and gradients between the first way and the others.

    Raises:
        AssertionError: A difference exceeds its tolerance. Or the loss does not change if the row is treated
            as one document, in which case a missing mask would not be detected.
    """
    first, *others = case.ways
    expected = trainer.backward(first, row)
    slots = len(row.input_ids)
    # The same row as one document: attention without boundaries has to give a different loss.
    joined = replace(row, position_ids=np.arange(slots), document_lengths=(slots,))
    with torch.no_grad():
        joined_off = abs(trainer.loss(case.ways[-1], joined).item() / expected - 1)
    assert joined_off > _LOSS_TOLERANCE, f"joined documents change the loss by {joined_off:.1e} only"
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    found = {"one document": {"loss": joined_off}}
    for way in others:
        loss_off = abs(trainer.backward(way, row) / expected - 1)
        pairs = zip(trainer.model.parameters(), gradients, strict=True)
        gradient_off = max(float((each.grad - other).norm() / other.norm()) for each, other in pairs)
        assert loss_off <= _LOSS_TOLERANCE, f"{way}: the loss is off by {loss_off:.1e}"
        assert gradient_off <= _GRADIENT_TOLERANCE, f"{way}: a gradient is off by {gradient_off:.1e}"
        found[way] = {"loss": loss_off, "gradient": gradient_off}
    return found


def seconds_of_steps(trainer: Trainer, case: Case, rows: list[MicroBatch]) -> dict[str, list[float]]:
    """Time steps: each round runs every way on the same row, in reversed order every other round."""
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    began, number = time.perf_counter(), 0
    while number < 2 or time.perf_counter() - began < case.seconds:
        for way in case.ways[:: 1 if number % 2 else -1]:
            seconds[way].append(trainer.step(way, rows[number % len(rows)])[1])
        number += 1
    return seconds


def one_step(case: Case) -> dict[str, float]:
    """Run one step and return its loss, its seconds, and its peak memory in MiB.

    Weights, gradients and optimizer states, which a warm-up step allocates, are not included. The learning
    rate is 0, so that the losses of several processes can be compared.
    """
    trainer = Trainer(case.vocabulary, lr=0.0)
    trainer.step(case.ways[0], rows_of(case.vocabulary, _WARM_UP_SLOTS)[0])
    row = rows_of(case.vocabulary, case.slots)[0]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    loss, seconds = trainer.step(case.ways[0], row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"loss": loss, "seconds": seconds, "mib": peak / 2**20}


def turns(case: Case) -> dict[str, Any]:
    """Compare losses and gradients of the ways, then time them alternating."""
    rows, trainer = rows_of(case.vocabulary, case.slots), Trainer(case.vocabulary, lr=1e-4)
    return {"off": compare(trainer, case, rows[0]), "seconds": seconds_of_steps(trainer, case, rows)}


def measure(case: Case, time_limit_seconds: float) -> dict[str, Any]:
    """Measure the ways of a case: memory of each in its own process, then time of all, alternating.

    A way that exceeds memory or the time limit has a text instead of numbers. One whose step takes more than
    `_REPEATED_UP_TO_SECONDS`, or that has no other way to alternate with, has only its single step.
    """
    alone = {
        way: in_fresh_process(replace(case, ways=(way,), alone=True), time_limit_seconds) for way in case.ways
    }
    ended = {way: each for way, each in alone.items() if isinstance(each, dict)}
    losses = [each["loss"] for each in ended.values()]
    assert not losses or max(losses) / min(losses) - 1 <= _LOSS_TOLERANCE, f"losses differ: {ended}"
    quick = tuple(way for way, each in ended.items() if each["seconds"] <= _REPEATED_UP_TO_SECONDS)
    together = in_fresh_process(replace(case, ways=quick), time_limit_seconds) if len(quick) > 1 else ""
    rows = rows_of(case.vocabulary, case.slots)
    found: dict[str, Any] = {
        "vocabulary": case.vocabulary,
        "slots": case.slots,
        "labelled_share": sum(row.trained_tokens for row in rows) / (len(rows) * case.slots),
        "documents_per_row": sum(len(row.document_lengths) for row in rows) / len(rows),
        "ways": alone,
    }
    if isinstance(together, dict):
        found |= together
    elif together:
        found["hindered"] = together
    return found


def seconds_cell(found: dict[str, Any], way: str) -> str:
    """Return the table cell of a way's seconds: the median, its single step in brackets, or the failure."""
    alone = found["ways"][way]
    if isinstance(alone, str):
        return alone
    repeated = found.get("seconds", {}).get(way)
    return f"{median(repeated):.2f}" if repeated else f"({alone['seconds']:.1f})"


def memory_cell(found: dict[str, Any], way: str) -> str:
    """Return the table cell of a way's peak memory in MiB, or the failure."""
    alone = found["ways"][way]
    return alone if isinstance(alone, str) else f"{alone['mib']:,.0f}"


def ratio(found: dict[str, Any], slow: str, fast: str) -> float | None:
    """Return the speedup of one way over another: the median over rounds, or that of single steps.

    None if one of the two exceeded its limits.
    """
    repeated = found.get("seconds", {})
    if slow in repeated and fast in repeated:
        return median(a / b for a, b in zip(repeated[slow], repeated[fast], strict=True))
    if isinstance(found["ways"][slow], str) or isinstance(found["ways"][fast], str):
        return None
    return float(found["ways"][slow]["seconds"] / found["ways"][fast]["seconds"])


def ratio_cell(found: dict[str, Any], slow: str, fast: str) -> str:
    """Return the table cell of a speedup."""
    value = ratio(found, slow, fast)
    return "-" if value is None else f"{value:.2f}"


def tell(
    cases: list[dict[str, Any]],
    header: list[str],
    row_of: Callable[[dict[str, Any]], list[str]],
    as_json: bool,
) -> None:
    """Print the results as a Markdown table or as JSON, with the environment."""
    environment = describe("torch", "transformers")
    if as_json:
        say(json.dumps({"cases": cases, "tile_tokens": TILE_TOKENS, "environment": environment}))
        return
    for cells in (header, ["---"] * len(header), *map(row_of, cases)):
        say(f"| {' | '.join(cells)} |")
    say(json.dumps({"off": [found.get("off") for found in cases], "environment": environment}))


def in_fresh_process(case: Case, time_limit_seconds: float) -> dict[str, Any] | str:
    """Measure in a new process, which may use the available memory except `_LEFT_FREE_BYTES`.

    Returns:
        The JSON object that it printed, or a text if it exceeded the memory or time limit.

    Raises:
        RuntimeError: The process failed for another reason.
    """
    command = [sys.executable, "-m", "tests.benchmarks.step", json.dumps(asdict(case))]
    limit = _available_bytes() - _LEFT_FREE_BYTES
    try:
        done = subprocess.run(
            [*command, str(limit)], cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=time_limit_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"more than {time_limit_seconds:.0f} s"
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return f"more than {limit / 2**30:.0f} GiB"
    if done.returncode:
        raise RuntimeError(f"{case} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _limit_memory(further_bytes: int) -> None:
    """Limit the address space, so that an allocation fails here before the kernel's OOM killer acts."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + further_bytes, held + further_bytes))


def main() -> None:
    """Measure one case and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="the fields of `Case`, as JSON")
    parser.add_argument("limit", type=int, help="bytes that may be taken")
    arguments = parser.parse_args()
    fields = json.loads(arguments.case)
    _limit_memory(arguments.limit)
    torch.set_num_threads(_THREADS)
    case = Case(**{**fields, "ways": tuple(fields["ways"])})
    say(json.dumps(one_step(case) if case.alone else turns(case)))


if __name__ == "__main__":
    main()
