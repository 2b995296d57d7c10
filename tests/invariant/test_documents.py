"""Packed documents do not attend to each other in any supported architecture; the others are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.config.schema import ModelSpec
from orchestrator.data.loader import MicroBatch
from orchestrator.errors import SpecError
from orchestrator.model.attention import VarlenMetadata, document_attention
from orchestrator.model.build import build_model, require_supported
from orchestrator.model.loss import ModelInputs, loss_sum
from tests.invariant import material

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
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
# In some of these, a layer's window is only in the attention mask; the layer does not pass it to attention.
WINDOWED = [
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phimoe",
    "olmo3",
]
MIXING = "has layers of kind linear_attention"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {}, MIXING),
    "bloom": ("bloom", {}, "does not let its attention be replaced"),
    "falcon": ("falcon", {}, "has no attention that can be replaced"),
    "qwen3_next": ("qwen3_next", {}, MIXING),
    "recurrent_gemma": ("recurrent_gemma", {}, MIXING),
    "minimax": ("minimax", {}, MIXING),
    "sinks": ("gpt_oss", {"num_local_experts": 2}, "has attention sinks"),
    "place in the pack": ("llama4_text", {}, "scales attention by a token's place in the pack"),
    "both ways": ("bert", {}, "has attention that is not causal"),
    "both ways by choice": ("gemma3_text", {"use_bidirectional_attention": True}, "see what follows them"),
    "images": ("gemma3", {}, "is a model of more than text"),
    "images and text": ("phi4_multimodal", {}, "is a model of more than text"),
    "text in two parts": ("musicgen", {}, "is not a model that can be loaded|is a model of more than text"),
}
LONG_ONLY: dict[str, tuple[str, dict[str, Any], str]] = {
    "chunks": (
        "llama4_text",
        {"attention_chunk_size": 64, "attn_temperature_tuning": False},
        "within chunks of 64 tokens .* use data.max_length of at most 64",
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
        "type dynamic: a document longer than max_position_embeddings=64 .* at most 64",
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            },
        },
        "type longrope: a document longer than original_max_position_embeddings=64 .* at most 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("value_dim", [8, 12])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_attention_is_that_of_each_document_alone(heads: tuple[int, int], value_dim: int) -> None:
    lengths = [17, 1, 33, 16, 2, 17, 40]
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, count, sum(lengths), size, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads[0], 8), (heads[1], 8), (heads[1], value_dim))
    )
    documents = VarlenMetadata.from_lengths(lengths, "sdpa", CPU)
    # query, key, value: [1, heads, tokens, head_dim]; packed: [1, tokens, heads, value_dim].
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


@pytest.mark.parametrize(
    ("family", "window"), [*((family, {}) for family in LET_IN), *((family, WINDOW) for family in WINDOWED)]
)
def test_packed_loss_is_that_of_single_documents(family: str, window: dict[str, Any], tmp_path: Path) -> None:
    AutoConfig.for_model(family, **SIZES, **window).save_pretrained(tmp_path)
    require_supported(material.job_with(_spec(tmp_path), 64))
    built = _build(tmp_path).eval()
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), attn_implementation="eager"
    ).eval()
    plain.load_state_dict(built.state_dict())
    documents = [np.random.default_rng(length).integers(3, 100, length) for length in (17, 9, 33)]
    with torch.no_grad():
        packed = loss_sum(built, ModelInputs.from_batch(_packed(documents), "sdpa", CPU)).item()
        alone = sum(_loss_of_one(plain, torch.from_numpy(tokens)) for tokens in documents)
    assert packed == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("case", REFUSED)
def test_an_architecture_that_is_not_computed_is_refused_by_driver_and_worker(
    case: str, tmp_path: Path
) -> None:
    family, changes, reason = REFUSED[case]
    config = {"model_type": family, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    if family not in ("musicgen", "falcon"):  # their configurations have other fields for these sizes
        config = AutoConfig.for_model(family, **SIZES, **changes).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(SpecError, match=reason):
        require_supported(material.job_with(_spec(tmp_path), 64))
    with pytest.raises(SpecError, match=reason):
        _build(tmp_path)


@pytest.mark.parametrize("case", LONG_ONLY)
def test_what_only_long_documents_would_break_is_refused_for_them_alone(case: str, tmp_path: Path) -> None:
    family, changes, reason = LONG_ONLY[case]
    AutoConfig.for_model(family, **{**SIZES, **changes}).save_pretrained(tmp_path)
    require_supported(material.job_with(_spec(tmp_path), 64))
    with pytest.raises(SpecError, match=reason):
        require_supported(material.job_with(_spec(tmp_path), 65))


def _spec(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder), weights="random", gradient_checkpointing=False)


def _build(folder: Path) -> torch.nn.Module:
    return build_model(material.job_with(_spec(folder)), torch.float32, {"zero_optimization": {"stage": 2}})


def _packed(documents: list[np.ndarray]) -> MicroBatch:
    lengths = [len(tokens) for tokens in documents]
    first = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate(documents)
    # Every position but the last of each document predicts the next token.
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
