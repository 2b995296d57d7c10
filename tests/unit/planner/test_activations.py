"""Predicted activation memory of a layer matches the tensors that autograd saves in transformers' layers."""

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.planner.memory import kept_bytes, layer_bytes
from orchestrator.planner.workload import Model, Workload

TOKENS = 128
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 704, "vocab_size": 160,
}  # fmt: skip


def kept_by_autograd(family: str, attention: str, frozen: bool, **changes: Any) -> tuple[float, Workload]:
    """Return the bytes that autograd saves in one layer's forward pass, and the corresponding workload."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, **{**SIZES, **changes}, pad_token_id=0, attn_implementation=attention
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.requires_grad_(not frozen)
    (layer,) = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 1)
    found: dict[int, int] = {}
    tensors = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        tensors.append(tensor)  # keep it alive so that no address is reused
        return tensor

    # hidden: [1, TOKENS, hidden_size]; the additive mask of eager attention: [1, 1, TOKENS, TOKENS].
    hidden = torch.randn(1, TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(TOKENS)[None]
    angles = model.base_model.rotary_emb(hidden, places)
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16) if attention == "eager" else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, attention_mask=mask, position_embeddings=angles, position_ids=places)
    others = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *angles)}
    shape = Model.from_config({**config.to_dict(), "model_type": family})
    assert shape is not None
    method = {"method": "lora", "targets": ()} if frozen else {}
    work = Workload(shape, TOKENS, checkpointing="none", flash=attention != "eager", **method)  # type: ignore[arg-type]
    return float(sum(size for place, size in found.items() if place not in others)), work


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"intermediate_size": 1024}),
        ("mistral", {"num_key_value_heads": 4, "head_dim": 64}),
        ("qwen2", {}),
    ],
)
def test_a_layer_keeps_what_autograd_does_and_little_more(family: str, changes: dict[str, Any]) -> None:
    measured, work = kept_by_autograd(family, "sdpa", frozen=False, **changes)
    assert measured <= kept_bytes(work) <= 1.2 * measured
    assert layer_bytes(work) == kept_bytes(work)


def test_a_frozen_layer_keeps_less() -> None:
    measured, work = kept_by_autograd("llama", "sdpa", frozen=True)
    trained, _ = kept_by_autograd("llama", "sdpa", frozen=False)
    assert measured < 0.8 * trained
    assert measured <= kept_bytes(work) <= 1.3 * measured


def test_eager_attention_keeps_scores_of_each_head() -> None:
    measured, work = kept_by_autograd("llama", "eager", frozen=False)
    without, _ = kept_by_autograd("llama", "sdpa", frozen=False)
    scores = 8 * TOKENS**2
    assert 2 * scores <= measured - without <= 6 * scores  # probabilities in 16 bits, and in fp32 as well
    assert measured <= 1.2 * layer_bytes(work)
