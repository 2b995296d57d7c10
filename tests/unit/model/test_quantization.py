"""Unsupported uses of quantized weights are reported before the weights are loaded."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.config.schema import DataSpec, JobSpec, MethodSpec, ModelSpec, ParallelSpec, SourceSpec
from orchestrator.model.adapters import adapt
from orchestrator.model.quantization import quantization_config, quantization_problem

GPTQ = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})
PLAIN = SimpleNamespace()


def method(**fields: Any) -> MethodSpec:
    return MethodSpec(**{"type": "lora", **fields})


def job(zero_stage: Any = 3, weights: Any = "pretrained", **fields: Any) -> JobSpec:
    return JobSpec(
        name="j",
        model=ModelSpec(path="m", weights=weights),
        data=DataSpec(train=(SourceSpec(path="d"),)),
        method=method(**fields),
        parallel=ParallelSpec(zero_stage=zero_stage),
    )


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_weights_that_are_quantised_already_are_only_for_adapters() -> None:
    problem = quantization_problem(GPTQ, job(type="full"))
    assert problem is not None
    assert problem.endswith("use method.type: lora")


def test_weights_are_not_quantized_twice() -> None:
    problem = quantization_problem(GPTQ, job(quantization="nf4"))
    assert problem is not None
    assert "already quantized (gptq)" in problem
    assert "use quantization: none" in problem


@pytest.mark.parametrize(
    ("config", "chosen", "package", "extra"),
    [(GPTQ, "none", "gptqmodel", "gptq"), (PLAIN, "nf4", "bitsandbytes", "qlora")],
)
@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_kernel_is_named_with_its_extra(config: Any, chosen: str, package: str, extra: str) -> None:
    problem = quantization_problem(config, job(2, quantization=chosen))
    assert problem is not None
    assert f"needs the package {package}" in problem
    assert problem.endswith(f"install the extra `{extra}`")


@pytest.mark.usefixtures("nothing_installed")
def test_whole_weights_need_no_package() -> None:
    assert quantization_problem(PLAIN, job(type="full")) is None
    assert quantization_problem(PLAIN, job()) is None


def test_bits_are_stored_as_numbers_that_zero_3_can_partition() -> None:
    assert quantization_config(method(), torch.bfloat16) is None
    config = quantization_config(method(quantization="nf4"), torch.bfloat16)
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.bnb_4bit_use_double_quant
    assert not quantization_config(
        method(quantization="nf4", double_quantization=False), torch.float16
    ).bnb_4bit_use_double_quant
    assert quantization_config(method(quantization="int8"), torch.bfloat16).load_in_8bit


def test_weights_of_gptq_are_read_and_not_partitioned() -> None:
    assert str(quantization_problem(GPTQ, job(3))).endswith("use zero_stage: 2")
    assert str(quantization_problem(GPTQ, job(2, "random"))).endswith("use weights: pretrained")
    assert str(quantization_problem(GPTQ, job(2, use_dora=True))).endswith("use use_dora: false")
    awq = SimpleNamespace(quantization_config={"quant_method": "awq", "bits": 4})
    assert "use a GPTQ checkpoint" in str(quantization_problem(awq, job(2)))


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_dora_reads_weights_of_few_bits_at_every_pass_and_leaves_them_where_they_are(
    bits: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    chosen = method(quantization=bits, use_dora=True)
    options = {"dtype": torch.float32, "quantization_config": quantization_config(chosen, torch.float32)}
    adapted = adapt(AutoModelForCausalLM.from_pretrained(tmp_path, **options), chosen, torch.float32, seed=0)
    adapted.train()
    weights = {name: id(weight) for name, weight in adapted.named_parameters()}
    ids = torch.arange(3, 40)[None]
    with adapted.disable_adapter():
        plain = adapted(ids).logits
    for _ in range(3):
        torch.testing.assert_close(adapted(ids).logits, plain, rtol=1e-3, atol=1e-4)
    assert {name: id(weight) for name, weight in adapted.named_parameters()} == weights
