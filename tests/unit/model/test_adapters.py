"""Target modules and parameter counts of LoRA adapters."""

from typing import Any, Literal

import pytest
import torch
from torch import nn

from orchestrator.config.schema import MethodSpec
from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.adapters import adapt, num_adapter_params


def build(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.for_model(kind, **changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION)


def small(**changes: Any) -> Any:
    return build(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, **changes,
    )  # fmt: skip


def adapted(model: Any, **method: Any) -> Any:
    with torch.device("meta"):
        return adapt(model, MethodSpec(type="lora", **method), torch.float32, seed=0)


def trained(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


class Qwen7B(nn.Module):
    """The linear layers of Qwen-7B under their published names; transformers does not include its code."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"c_attn": nn.Linear(4096, 3 * 4096), "c_proj": nn.Linear(4096, 4096)})
            self.mlp = nn.ModuleDict(
                {
                    "w1": nn.Linear(4096, 11008, bias=False),
                    "w2": nn.Linear(4096, 11008, bias=False),
                    "c_proj": nn.Linear(11008, 4096, bias=False),
                }
            )

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(self.Layer() for _ in range(32))

    def prepare_inputs_for_generation(self) -> None:
        """Exist because peft reads this attribute of causal LMs."""


@pytest.mark.parametrize(
    ("targets", "rank", "millions"),
    [(("c_attn",), 2, 1.05), (("c_attn",), 8, 4.19), (("c_attn",), 64, 33.55), ("all-linear", 8, 17.89)],
)
def test_counts_of_qwen_7b_are_the_published_ones(
    targets: tuple[str, ...] | Literal["all-linear"], rank: int, millions: float
) -> None:
    with torch.device("meta"):
        model = Qwen7B()
    assert count(adapted(model, target_modules=targets, rank=rank)) / 1e6 == pytest.approx(
        millions, abs=0.005
    )


def test_counts_of_llama_2_7b() -> None:
    """Each of 32 layers has four weights of [4096, 4096] and three of [4096, 11008].

    A pair of LoRA matrices has rank * (inputs + outputs) parameters.
    """
    model = build(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    found = adapted(model, rank=16)
    assert count(found) == 32 * 16 * (4 * 8192 + 3 * 15104) == num_adapter_params(found) == 39_976_960


def test_attention_is_told_from_the_mlp_by_its_place() -> None:
    found = trained(adapted(small(), target_modules="attention"))
    assert all("self_attn" in name for name in found)
    assert {name.split(".")[-4] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_name_that_the_mlp_has_too_is_adapted_in_attention_only() -> None:
    with torch.device("meta"):
        model = Qwen7B()
    found = adapted(model, target_modules="attention", rank=8)
    assert not any(".mlp." in name for name in trained(found))
    # Per layer: c_attn has 4096 inputs and 3 * 4096 outputs, c_proj 4096 of each.
    assert count(found) == 32 * 8 * (4 * 4096 + 2 * 4096)


def test_all_linear_leaves_the_head_out() -> None:
    found = trained(adapted(small()))
    assert not any("lm_head" in name or "embed" in name for name in found)
    assert len(found) == 2 * 7 * 2  # layers * linear modules * (A and B)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_trained_whole(tied: bool) -> None:
    model = adapted(small(tie_word_embeddings=tied), train_embeddings=True, rank=4)
    whole = [name for name in trained(model) if "modules_to_save" in name]
    matrices = 1 if tied else 2
    assert count(model) - num_adapter_params(model) == matrices * 64 * 32
    assert len(whole) == matrices


def test_a_target_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(SpecError) as raised:
        adapted(small(), target_modules=("q_proj", "c_attn", "proj"))
    assert len(raised.value.problems) == 2
    assert raised.value.problems[0] == (
        "method.target_modules: LlamaForCausalLM has no linear layer c_attn; it has "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_a_frozen_weight_needs_no_gradient() -> None:
    model = adapted(small())
    assert all(("lora_" in name) == weight.requires_grad for name, weight in model.named_parameters())
