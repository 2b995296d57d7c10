"""Adapters of a GPTQ-quantized base model: training, resuming and merging."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.schema import JobSpec
from orchestrator.export.adapter import merged_model, write_adapter
from orchestrator.export.export import fp32_weights
from orchestrator.model.base_model_id import identity
from tests.invariant import material
from tests.invariant.group import Outcome, run_group
from tests.invariant.material import POLICIES, job

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
        reason="gptqmodel and optimum (extra gptq) are not installed; they want a newer torch than is pinned",
    ),
]
GROUP = 32
SIZES = {"intermediate_size": 192, "num_key_value_heads": 8, "num_hidden_layers": 1}
CASES = {"int4-zero2": (4, "zero2", 1), "int4-zero2-sp2": (4, "zero2", 2), "int8-zero1": (8, "zero1", 1)}
STEPS, HALF = 8, 4


def write_gptq(folder: Path, bits: int) -> None:
    """Write a tiny Llama in GPTQ format, quantized by rounding to nearest, and its dequantized copy.

    Per linear layer with `weight.T` of shape [inner, outer]: qweight [inner x bits / 32, outer] int32, qzeros
    [inner / GROUP, outer x bits / 32] int32, scales [inner / GROUP, outer] fp16, g_idx [inner] int32. The
    dequantized model is in the subfolder `whole`.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(material.SEED)
    config = LlamaConfig(**{**material.CONFIG, **SIZES})
    model = LlamaForCausalLM(config)
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.detach().T  # [inner, outer]
        inner, outer = weight.shape
        groups = weight.reshape(inner // GROUP, GROUP, outer)
        scales = (groups.abs().amax(1) * 2 / (2**bits - 1)).half()
        zero = 2 ** (bits - 1)
        codes = (groups / scales.float()[:, None]).round().add(zero).clamp(0, 2**bits - 1)
        module.weight.data = ((codes - zero) * scales.float()[:, None]).reshape(inner, outer).T.contiguous()
        zeros = torch.full((inner // GROUP, outer), zero - 1)  # the format stores zero points minus one
        tensors[f"{name}.qweight"] = packed(codes.reshape(inner, outer).T, bits).T.contiguous()
        tensors[f"{name}.qzeros"] = packed(zeros, bits)
        tensors[f"{name}.scales"] = scales
        tensors[f"{name}.g_idx"] = torch.arange(inner, dtype=torch.int32) // GROUP
    whole = {f"{name.removesuffix('.qweight')}.weight" for name in tensors if name.endswith(".qweight")}
    model.save_pretrained(folder / "whole")
    tensors |= {name: weight for name, weight in model.state_dict().items() if name not in whole}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True}
    written = {**config.to_dict(), "quantization_config": {**stored, "checkpoint_format": "gptq"}}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension into int32, [..., n] to [..., n x bits / 32], lowest bits first."""
    each = codes.to(torch.int64).numpy().astype(np.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(each << shifts, axis=-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def task_of(home: Path, name: str) -> dict[str, Any]:
    bits, policy, size = CASES[name]
    document = job(
        home / f"int{bits}", 2, {**POLICIES[policy], "sequence_parallel_size": size},
        method={"type": "lora", "rank": 8, "alpha": 16.0}, data={"packing": "best_fit"},
        checkpoint={"every_steps": HALF}, global_batch_size=4, max_steps=STEPS, lr=2e-2, warmup_ratio=0.0,
    )  # fmt: skip
    return {"name": name, "action": "train", "job": document, "data": str(home / "documents")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    material.write_documents(folder / "documents", 8, seed=1)
    for bits in (4, 8):
        (folder / f"int{bits}").mkdir()
        write_gptq(folder / f"int{bits}", bits)
    return folder


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, Outcome]:
    tasks = []
    for name in CASES:
        folder, task = str(home / "checkpoints" / name), task_of(home, name)
        whole = json.loads(json.dumps(task))
        whole["job"]["model"]["path"] += "/whole"
        resumed = {**task, "name": f"{name} resumed", "resume": f"{folder}/step-{HALF:08d}"}
        tasks += [{**task, "save_to": folder}, resumed, {**whole, "name": f"{name} whole"}]
    return run_group(home / "group", 2, tasks)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_beside_the_weights_that_the_bits_stand_for(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    steps, whole = (outcomes[each].answer["steps"] for each in (name, f"{name} whole"))
    # gptqmodel's matmuls have less than fp32 precision, and Adam's first steps depend on gradient signs.
    assert steps[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)
    assert steps[1]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-2)
    assert steps[0]["gradient_norm"] == pytest.approx(whole[0]["gradient_norm"], rel=3e-2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_where_it_stopped(name: str, outcomes: dict[str, Outcome]) -> None:
    steps, resumed = (outcomes[each].answer["steps"] for each in (name, f"{name} resumed"))
    assert [step["loss"] for step in resumed] == pytest.approx([s["loss"] for s in steps[HALF:]], rel=1e-5)


@pytest.mark.parametrize("name", ["int4-zero2", "int8-zero1"])
def test_the_merged_model_computes_what_the_run_did(
    name: str, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = JobSpec.model_validate_json(json.dumps(task_of(home, name)["job"]))
    weights = fp32_weights(home / "checkpoints" / name / f"step-{STEPS:08d}")
    for folder in ("adapter", "merged"):
        (tmp_path / folder).mkdir()
    write_adapter(spec, weights, tmp_path / "adapter", torch.float32, identity(spec))
    merged_model(spec, tmp_path / "adapter", torch.float32).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(f"{spec.model.path}/whole", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    assert not getattr(merged, "is_quantized", False)
    ids = torch.arange(3, 50)[None]
    with torch.no_grad():
        off = (merged(ids).logits - adapted(ids).logits).norm() / adapted(ids).logits.norm()
    assert off < 1e-3
