"""A worker that scores rows with DeepSpeed's sequence parallelism for transformers, and with this project's.

`group.run_group` starts it in a separate group, since `register_with_transformers` replaces the attention of
every model of the process.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional

from orchestrator.config.schema import ModelSpec
from orchestrator.data.balance import BatchShape
from orchestrator.data.corpus import Document, Int64Array
from orchestrator.data.loader import MicroBatch, PackLoader, SamplerConfig
from orchestrator.data.packing import Packs
from orchestrator.model.build import build_model
from orchestrator.model.loss import ModelInputs, loss_sum
from orchestrator.parallel import ulysses
from orchestrator.parallel.parallel_dims import ParallelDims
from tests.invariant import material, worker
from tests.invariant.material import VOCABULARY

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawn:
    """Documents of given lengths with random tokens; the last two thirds of each are trained."""

    lengths: Int64Array

    @classmethod
    def of(cls, lengths: list[int]) -> Drawn:
        return cls(np.array(lengths))

    @property
    def trained(self) -> Int64Array:
        return self.lengths - self.lengths // 3

    def document(self, number: int) -> Document:
        length = int(self.lengths[number])
        tokens = np.random.default_rng(number).integers(3, VOCABULARY, length).astype(np.uint32)
        return Document(tokens, np.arange(length) >= length // 3)


def row_of(lengths: list[int], shard: int = 0, shards: int = 1) -> MicroBatch:
    """Return one sequence-parallel shard of a row without padding, with documents of these lengths."""
    packs = Packs(np.arange(len(lengths)), np.array([0, len(lengths)]))
    batch_shape = BatchShape(sum(lengths), 1, 1, 1, sequence_parallel_size=shards)
    return PackLoader(Drawn.of(lengths), packs, batch_shape, SamplerConfig(seed=0)).assemble([0], shard)


def block_mask(lengths: list[int]) -> torch.Tensor:
    """Return a boolean attention mask, causal within each document, shape [1, 1, T, T]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] == document[None]).tril()[None, None]


@torch.no_grad()
def score_with_ours(task: worker.Task) -> worker.Answer:
    """Return the mean loss of each row, with this project's sequence parallelism over all ranks."""
    layout = ParallelDims(dist.get_world_size(), dist.get_world_size())
    sequence = ulysses.create_sequence_group(layout, 60)
    spec = ModelSpec(path=task["model"], gradient_checkpointing=False)
    model = build_model(material.job_with(spec), torch.float32, {"zero_optimization": {"stage": 2}})
    losses = {}
    for name, row in task["rows"].items():
        part = row_of(row["lengths"], dist.get_rank(), dist.get_world_size())
        losses[name] = _mean(loss_sum(model, ModelInputs.from_batch(part, "sdpa", CPU, sequence)), part)
    return {"losses": losses}, {}


@torch.no_grad()
def score_with_upstream(task: worker.Task) -> worker.Answer:
    """Return the mean loss of each row, with DeepSpeed's wrapper over all ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        task["model"], attn_implementation="sdpa", dtype=torch.float32
    ).train()
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=dist.get_world_size(),
        micro_batch_size=1,
    )
    losses = {}
    for name, row in task["rows"].items():
        part = row_of(row["lengths"], dist.get_rank(), dist.get_world_size())
        logits = model(
            input_ids=torch.from_numpy(part.input_ids)[None],
            position_ids=torch.from_numpy(part.position_ids)[None],
            attention_mask=block_mask(row["lengths"]) if row.get("mask") else None,
            use_cache=False,  # with a cache, transformers does not detect documents from position_ids
        ).logits[0, torch.from_numpy(part.label_positions)]
        labels = torch.from_numpy(part.labels)
        losses[name] = _mean(functional.cross_entropy(logits, labels, reduction="sum"), part)
    return {"losses": losses}, {}


def _mean(loss: torch.Tensor, part: MicroBatch) -> float:
    totals = torch.stack([loss.double(), torch.tensor(part.trained_tokens, dtype=torch.float64)])
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


ACTIONS = {"ours": score_with_ours, "upstream": score_with_upstream}

if __name__ == "__main__":
    worker.main(Path(sys.argv[1]), ACTIONS)
    sys.stdout.flush()
    os._exit(0)  # see worker.py
