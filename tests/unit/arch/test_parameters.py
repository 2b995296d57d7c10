"""Parameter counts from config.json equal those of the model that the driver builds on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.arch.families import FAMILIES
from orchestrator.arch.parameters import ParameterCount, parameter_count, parameters
from orchestrator.config.loader import parse
from orchestrator.config.schema import JobSpec, MethodSpec
from orchestrator.model.build import require_supported

SIZES = {
    "hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 2816, "vocab_size": 8000,
}  # fmt: skip
# Families whose code is not included in transformers: tests/unit/arch/test_registry.py covers them.
OUTSIDE = {"baichuan", "chatglm", "internlm", "internlm2", "qwen"}
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)


def job_of(folder: Path, method: str) -> JobSpec:
    return parse(
        f"name: j\nmodel: {{path: {folder}, weights: random}}\nmethod: {method}\n"
        "data: {train: [{path: d}], max_length: 512}\n"
    )


def saved(family: str, folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    # save_pretrained omits fields with default values, as published models do.
    AutoConfig.for_model(family, **SIZES, **TOKENS).save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    "method",
    [
        "{type: full}",
        "{type: lora, rank: 16}",
        "{type: lora, target_modules: attention, use_dora: true}",
        "{type: lora, target_modules: [o_proj, up_proj]}",
        "{type: lora, train_embeddings: true}",
    ],
)
def test_a_llama_is_counted_to_the_parameter(method: str, tmp_path: Path) -> None:
    config, job = saved("llama", tmp_path), job_of(tmp_path, method)
    assert parameter_count(config, job.method) == require_supported(job)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "mistral", "olmo2", "phi3", "qwen2"])
@pytest.mark.parametrize("method", ["{type: full}", "{type: lora}"])
def test_other_families_are_counted_to_the_parameter(family: str, method: str, tmp_path: Path) -> None:
    config, job = saved(family, tmp_path), job_of(tmp_path, method)
    assert parameter_count(config, job.method) == require_supported(job)


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "biased": dict.fromkeys(
        ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qkv_bias"), True
    ),
    "not biased": dict.fromkeys(("attention_bias", "use_bias"), False),
    "norms": {"qk_layernorm": True, "use_qk_norm": True, "use_parallel_residual": True},
    "tied": {"tie_word_embeddings": True},
    "not tied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OUTSIDE))
def test_each_family_is_counted_as_transformers_builds_it(family: str, variant: str) -> None:
    config, exact = built(family, {**SIZES, **VARIANTS[variant]})
    found = parameters(config)
    assert found is not None
    assert found.total == exact


def built(family: str, fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return a configuration and the parameter count of the model that transformers builds from it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **fields, **TOKENS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {**config.to_diff_dict(), "model_type": family}, model.num_parameters()


def test_a_family_that_is_not_known_is_not_counted() -> None:
    assert parameter_count({"model_type": "gpt2"}, MethodSpec()) is None


def test_names_that_are_not_known_may_stand_for_every_module(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES}
    unknown = parameter_count(config, MethodSpec(type="lora", target_modules=("wqkv",)))
    assert unknown == parameter_count(config, MethodSpec(type="lora"))
    assert isinstance(unknown, ParameterCount)
