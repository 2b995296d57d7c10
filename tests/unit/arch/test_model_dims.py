"""Dimensions read from configurations agree with the models that transformers builds from them."""

import json
from typing import Any

import pytest
import torch

from orchestrator.arch.families import FAMILIES
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.paths import resolve

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96, "vocab_size": 160,
}  # fmt: skip

# Families whose code is published with their weights and not included in transformers.
OUTSIDE = {"baichuan", "chatglm", "internlm", "internlm2", "qwen"}


def test_a_configuration_gives_its_shape() -> None:
    assert ModelDims.from_config(LLAMA) == ModelDims(64, 3, 4, 2, 24, 96, 160)


@pytest.mark.parametrize("missing", [True, False])
def test_what_old_configurations_leave_out_or_empty(missing: bool) -> None:
    config: dict[str, Any] = {**LLAMA, "num_key_value_heads": None, "head_dim": None}
    if missing:
        del config["num_key_value_heads"], config["head_dim"]
    shape = ModelDims.from_config(config)
    assert shape is not None
    assert (shape.kv_heads, shape.head_dim) == (4, 16)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bert", "", None])
def test_a_family_that_is_not_known_has_no_shape(family: str | None) -> None:
    assert ModelDims.from_config({**LLAMA, "model_type": family}) is None
    assert ModelDims.from_config({}) is None


def test_bloom_may_have_names_of_its_own() -> None:
    config = {"model_type": "bloom", "n_embed": 64, "n_layer": 3, "num_attention_heads": 4, "vocab_size": 160}
    assert ModelDims.from_config(config) == ModelDims(64, 3, 4, 4, 16, 256, 160, mlp_matrices=2)


def test_linear_parameters_by_hand() -> None:
    shape = ModelDims(64, 3, 4, 2, 24, 96, 160)
    q = o = 64 * 4 * 24
    k = v = 64 * 2 * 24
    assert shape.linear_parameters_per_layer == q + k + v + o + 3 * 64 * 96


def test_the_builtin_model_has_a_shape() -> None:
    config = json.loads((resolve("builtin/tiny-llama") / "config.json").read_text())
    assert ModelDims.from_config(config) == ModelDims(256, 4, 8, 2, 32, 688, 2048)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OUTSIDE))
def test_each_family_has_the_matrices_that_are_counted(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    if family in ("bloom", "gpt_neox", "phi3", "stablelm"):  # no head_dim field: hidden_size / heads
        sizes["head_dim"] = 16
    config = AutoConfig.for_model(family, **sizes, pad_token_id=0)
    shape = ModelDims.from_config(config.to_dict())
    assert shape is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    counted = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    assert counted == len(layers) * shape.linear_parameters_per_layer
    assert len(layers) == shape.layers
    assert tuple(model.get_output_embeddings().weight.shape) == (shape.vocab_size, shape.hidden_size)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"sliding_window": 16}, (0, 0)),
        ("mistral", {"sliding_window": 16}, (3, 16)),
        ("mistral", {"sliding_window": None}, (0, 0)),
        ("phi3", {"sliding_window": 16, "head_dim": 16}, (3, 16)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, (0, 0)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (2, 16)),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, (1, 16)),
        ("gemma2", {"sliding_window": 16}, (2, 16)),
        ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2}, (2, 16)),
    ],
)
def test_layers_with_a_window_are_those_that_transformers_gives_one(
    family: str, changes: dict[str, Any], expected: tuple[int, int]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model(family, **{**sizes, **changes}, pad_token_id=0)
    shape = ModelDims.from_config(config.to_dict())
    assert shape is not None
    assert (shape.sliding_window_layers, shape.window) == expected
    if family not in ("llama", "mistral", "phi3"):  # their layers have no sliding_window attribute
        with torch.device("meta"):
            layers = AutoModelForCausalLM.from_config(config).model.layers
        found = [layer.self_attn.sliding_window for layer in layers]
        assert found.count(16) == expected[0]


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("gemma2", {"num_hidden_layers": 26}, 13),
        ("gemma3_text", {"num_hidden_layers": 26}, 22),
        ("gemma3_text", {"num_hidden_layers": 8, "sliding_window_pattern": 2}, 4),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 1}, 0),
    ],
)
def test_windows_of_files_that_do_not_name_each_layer(
    family: str, changes: dict[str, Any], expected: int
) -> None:
    shape = ModelDims.from_config({**LLAMA, "model_type": family, "sliding_window": 16, **changes})
    assert shape is not None
    assert shape.sliding_window_layers == expected
