"""Documents of one pack stay apart in every architecture that is let in; the others are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.data.loader import MicroBatch
from orchestrator.errors import SpecError
from orchestrator.model.attention import Documents, document_attention
from orchestrator.model.build import build_model
from orchestrator.model.loss import Inputs, loss_sum
from orchestrator.spec import ModelSpec

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LET_IN = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma3_text", "phi3", "gpt_neox",
    "olmo2", "granite", "smollm3", "cohere2", "starcoder2",
]  # fmt: skip
REFUSED = {
    "mamba": "does not let its attention be replaced",
    "bloom": "does not let its attention be replaced",
    "qwen3_next": "does not let its attention be replaced",
    "recurrent_gemma": "has layers of kind linear_attention",
    "minimax": "has layers of kind linear_attention",
}


@pytest.mark.parametrize("value_dim", [8, 12])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_attention_is_that_of_each_document_alone(heads: tuple[int, int], value_dim: int) -> None:
    lengths = [17, 1, 33, 16, 2, 17, 40]
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, count, sum(lengths), size, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads[0], 8), (heads[1], 8), (heads[1], value_dim))
    )
    documents = Documents.of(lengths, "sdpa", CPU)
    packed, _ = document_attention(torch.nn.Module(), query, key, value, None, documents=documents)
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    alone = torch.cat([_by_hand(*part) for part in zip(*parts, strict=True)], dim=2).transpose(1, 2)
    torch.testing.assert_close(packed, alone)
    weights = torch.randn_like(alone)
    for ours, theirs in zip(
        torch.autograd.grad((packed * weights).sum(), (query, key, value)),
        torch.autograd.grad((alone * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def _by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("family", LET_IN)
def test_packed_loss_is_that_of_single_documents(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family, **SIZES).save_pretrained(tmp_path)
    built = _build(tmp_path).eval()
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), attn_implementation="eager"
    ).eval()
    plain.load_state_dict(built.state_dict())
    documents = [np.random.default_rng(length).integers(3, 100, length) for length in (17, 9, 33)]
    with torch.no_grad():
        packed = loss_sum(built, Inputs.of(_packed(documents), "sdpa", CPU)).item()
        alone = sum(_loss_of_one(plain, torch.from_numpy(tokens)) for tokens in documents)
    assert packed == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_mixes_documents_is_refused(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family, **SIZES).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=REFUSED[family]):
        _build(tmp_path)


def _build(folder: Path) -> torch.nn.Module:
    spec = ModelSpec(path=str(folder), weights="random", gradient_checkpointing=False)
    return build_model(spec, torch.float32, seed=0, ds_config={"zero_optimization": {"stage": 2}})


def _packed(documents: list[np.ndarray]) -> MicroBatch:
    lengths = [len(tokens) for tokens in documents]
    first = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate(documents)
    scored = np.setdiff1d(np.arange(len(tokens)), first + np.array(lengths) - 1)
    return MicroBatch(
        input_ids=tokens,
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        document_lengths=tuple(lengths),
        label_positions=scored,
        labels=tokens[scored + 1],
        tokens=len(tokens),
        square_tokens=0,
    )


def _loss_of_one(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return float(functional.cross_entropy(logits, tokens[1:], reduction="sum"))
