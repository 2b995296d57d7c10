"""Muon is rejected if DeepSpeed would apply it to weights other than two-dimensional layer weights."""

import pytest
import torch

from orchestrator.model.compatibility import muon_unsupported_reason

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "changes", "weight"),
    [
        ("llama", {"intermediate_size": 32}, None),
        ("llama", {"intermediate_size": 32, "tie_word_embeddings": True}, None),
        ("gpt2", {"n_positions": 64}, "transformer.wte.weight"),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 32}, "experts"),
    ],
)
def test_embeddings_and_stacks_of_matrices_are_not_for_muon(
    family: str, changes: dict[str, int], weight: str | None
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SMALL, **changes)
    with torch.device("meta"):
        problem = muon_unsupported_reason(AutoModelForCausalLM.from_config(config))
    if weight is None:
        assert problem is None
    else:
        assert problem is not None
        assert weight in problem
        assert problem.endswith("use optim.optimizer: adamw")
