"""Builds the inputs of the invariant tests: a tiny model, a token store of documents, and a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, Encoded
from orchestrator.data.corpus import Corpus
from orchestrator.data.packing import Packs
from orchestrator.data.token_cache import TokenStore, write_index, write_shard

MAX_LENGTH = 96
VOCABULARY = 160
SEED = 11

POLICIES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero1-optimizer-cpu": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "zero2": {"zero_stage": 2},
    "zero2-optimizer-cpu": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"zero_stage": 3},
    "zero3-optimizer-cpu": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "zero3-all-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
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
    """Write a tiny random Llama with 8 attention heads and 2 KV heads, in Hugging Face format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes})).save_pretrained(folder)


def write_model_of(family: str, folder: Path, **changes: Any) -> None:
    """Write a tiny random model of any architecture, with the dimensions of the tiny Llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    sizes = {name: value for name, value in CONFIG.items() if name not in ("architectures", "model_type")}
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_tokenizer(folder: Path, tokens: int) -> None:
    """Write a word-level tokenizer with `tokens` tokens into the folder of a model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(tokens)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_documents(folder: Path, count: int, seed: int, vocabulary: int = VOCABULARY) -> None:
    """Write a token store of random documents with odd lengths below MAX_LENGTH.

    Every ninth document has no trained token, like a prompt whose answer was truncated.
    """
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(generator.integers(3, MAX_LENGTH)) | 1
        tokens = generator.integers(3, vocabulary, length).astype(np.uint32)
        prompt = length if number % 9 == 4 else int(generator.integers(0, length - 1))
        turn = np.where(np.arange(length) >= max(1, prompt), np.uint8(LAST_RESPONSE), np.uint8(CONTEXT))
        documents.append(Encoded(tokens, turn))
    _write_store(folder, documents)


def write_documents_with_late_labels(folder: Path, count: int, seed: int) -> None:
    """Write a token store in which the first half of every pack of MAX_LENGTH tokens has no label.

    Long documents have one label at their end; short ones have none and fit into the same pack.
    """
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        short = number % 7 == 6
        length = int(
            generator.integers(3, 16) if short else generator.integers(2 * MAX_LENGTH // 3, MAX_LENGTH)
        )
        tokens = generator.integers(3, VOCABULARY, length).astype(np.uint32)
        turn = np.full(length, np.uint8(CONTEXT))
        turn[-1] = CONTEXT if short else LAST_RESPONSE
        documents.append(Encoded(tokens, turn))
    _write_store(folder, documents)


def _write_store(folder: Path, documents: list[Encoded]) -> None:
    folder.mkdir(parents=True)
    half = len(documents) // 2
    shards = [write_shard(folder, 0, documents[:half]), write_shard(folder, 1, documents[half:])]
    write_index(folder, shards, {})


def job_with(model: ModelSpec, max_length: int = MAX_LENGTH) -> JobSpec:
    """Return a job with a model and a pack length, and defaults otherwise."""
    data = DataSpec(train=(SourceSpec(path="unused"),), max_length=max_length)
    return JobSpec(name="test", model=model, data=data)


def planned(job: JobSpec, folder: Path) -> tuple[Corpus, Packs]:
    """Return the documents of a token store and their packs, with the data settings of a job."""
    return packed_dataset.make([TokenStore(folder)], [SourceSpec(path="unused")], job.data, job.run.seed)


def job(folder: Path, workers: int, parallel: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a job document on the tiny model, with gradient clipping that takes effect.

    Args:
        folder: The model's folder.
        workers: World size.
        parallel: Fields of `parallel`, such as ZeRO stage and offloading.
        **changes: Fields of other sections, as dictionaries, or single fields of `optim`; these replace
            the defaults below.
    """
    sections = {
        name: changes.pop(name, {}) for name in ("data", "model", "method", "run", "eval", "checkpoint")
    }
    document = {
        "name": "invariant",
        "model": {"path": str(folder), "gradient_checkpointing": False, **sections["model"]},
        "method": sections["method"],
        "data": {"train": [{"path": "unused"}], "max_length": MAX_LENGTH, **sections["data"]},
        "parallel": {"workers": workers, "device": "cpu", **parallel},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.5, "weight_decay": 0.01, "global_batch_size": 8, **changes},
        "run": {"seed": SEED, **sections["run"]},
        "checkpoint": sections["checkpoint"],
    }
    return document | (
        {"eval": {"data": [{"path": "unused"}], **sections["eval"]}} if sections["eval"] else {}
    )
