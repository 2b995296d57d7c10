"""A job that starts from an adapter is rejected unless the adapter's file holds exactly its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import SpecError
from orchestrator.model.build import require_supported
from tests.unit.model.damage import Tensors, cut, job


def write_adapter(folder: Path, whole: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16.0, target_modules=["q_proj", "up_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config).save_pretrained(folder)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "one lost": (lambda t: t.pop(A), ("lacks 1 of the tensors of the adapter of this job", A)),
    "one too many": (
        lambda t: t.update({"x.lora_A.weight": torch.zeros(2)}),
        ("has 1 tensor that", "x.lora_A"),
    ),
    "another width": (lambda t: t.update({A: torch.zeros(8, 32)}), (f"{A} is [8, 32] and not [8, 64]",)),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused(case: str, whole: Path, tmp_path: Path) -> None:
    change, words = ADAPTERS[case]
    write_adapter(tmp_path, whole)
    method = {"type": "lora", "target_modules": ["q_proj", "up_proj"], "adapter": str(tmp_path)}
    require_supported(job(whole, method=method))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpecError) as refusal:
        require_supported(job(whole, method=method))
    assert all(word in str(refusal.value) for word in (f"method.adapter={tmp_path} does not match", *words))


@pytest.mark.parametrize("damage", ["cut", "pointer", "lost"])
def test_an_adapter_whose_file_cannot_be_read_is_refused(damage: str, whole: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, whole)
    file = tmp_path / "adapter_model.safetensors"
    if damage == "cut":
        cut(file.name)(tmp_path)
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        file.unlink()
    method = {"type": "lora", "target_modules": ["q_proj", "up_proj"], "adapter": str(tmp_path)}
    words = {"cut": "cannot be read", "pointer": "git lfs pull", "lost": "has no adapter_model.safetensors"}
    with pytest.raises(SpecError, match=words[damage]):
        require_supported(job(whole, method=method))
