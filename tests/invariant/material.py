"""What every process of a test builds for itself: a tiny model, documents of odd lengths, and a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from orchestrator.data.loader import Geometry, PackLoader
from orchestrator.data.packing import Packs, best_fit, one_each
from orchestrator.data.store import Account, TokenStore, write_index, write_shard
from orchestrator.data.template import Document
from orchestrator.spec import JobSpec

MAX_LENGTH = 96
VOCABULARY = 160
SEED = 11

Packing = Literal["none", "best_fit"]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # large enough for losses and gradients to differ from step to step
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, **changes: Any) -> None:
    """Write a tiny random Llama with 8 heads and 2 KV heads, in Hugging Face format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes})).save_pretrained(folder)


def write_documents(folder: Path, count: int, seed: int) -> None:
    """Write a store of random documents; every ninth has nothing to train on, as a cut-off prompt has."""
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(generator.integers(3, MAX_LENGTH + 1)) | 1
        length = min(length, MAX_LENGTH)
        tokens = generator.integers(3, VOCABULARY, length).astype(np.uint32)
        prompt = length if number % 9 == 4 else int(generator.integers(0, length - 1))
        documents.append(Document(tokens, np.arange(length) >= max(1, prompt)))
    folder.mkdir(parents=True)
    half = count // 2
    shards = [write_shard(folder, 0, documents[:half], Account()), write_shard(folder, 1, documents[half:], Account())]
    write_index(folder, shards, {})


def pack(store: TokenStore, packing: Packing) -> Packs:
    """Return the packs of a store."""
    return best_fit(store.lengths, MAX_LENGTH, SEED) if packing == "best_fit" else one_each(store.lengths)


def loader(folder: Path, packing: Packing, job: JobSpec, shuffle: bool = True) -> PackLoader:
    """Return the loader of a store, laid out for a job."""
    store = TokenStore(folder)
    geometry = Geometry(MAX_LENGTH, job.optim.global_batch_size, job.optim.micro_batch_size, job.data_parallel_size)
    return PackLoader(store, pack(store, packing), geometry, job.run.seed, shuffle)


def job(model: Path, workers: int, parallel: dict[str, Any], **optim: Any) -> JobSpec:
    """Return a job on the tiny model, with clipping that takes effect."""
    document = {
        "name": "invariant",
        "model": {"path": str(model), "gradient_checkpointing": optim.pop("gradient_checkpointing", False)},
        "data": {"train": [{"path": "unused"}], "max_length": MAX_LENGTH},
        "parallel": {"workers": workers, "device": "cpu", **parallel},
        "optim": {"lr": 1e-3, "clip_norm": 0.5, "weight_decay": 0.01, "global_batch_size": 8, **optim},
        "run": {"seed": SEED},
    }
    return JobSpec.model_validate_json(json.dumps(document))
