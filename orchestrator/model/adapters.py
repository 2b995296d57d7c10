"""LoRA adapters through peft: add them to target modules, check them against a job, and load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn

from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, MethodSpec
from orchestrator.errors import SpecError
from orchestrator.model import base_model_id
from orchestrator.model.quantization import is_quantized, patch_dora
from orchestrator.model.stored_weights import UnreadableError, shapes_in
from orchestrator.model.weights import WeightsMismatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
_SAME = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
_ATTENTION = ("attn", "attention")  # substrings of the names of attention modules in transformers


def adapt(model: PreTrainedModel, method: MethodSpec, dtype: torch.dtype, seed: int) -> PeftModel:
    """Freeze a causal LM and add trainable LoRA adapters to it (arXiv 2106.09685).

    The B matrix of every adapter is initialized with zeros, so the adapted model first computes the same
    outputs as the base model.

    Args:
        model: A causal LM of transformers; under ZeRO-3 it may already be partitioned.
        method: Rank, alpha, target modules and other options of the adapters.
        dtype: dtype of the adapters; the optimizer keeps its own copy in fp32.
        seed: Seed of the random A matrices; must be the same on every rank. The values do not depend on the
            ZeRO stage.

    Returns:
        The model inside peft's wrapper.

    Raises:
        SpecError: No module matches a target name, or peft does not support one of the target modules.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # a factor: peft never needs an integer
        lora_dropout=method.dropout,
        target_modules=targets(model, method),
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        modules_to_save=_embeddings(model) if method.train_embeddings else None,
        ensure_weight_tying=method.train_embeddings and _is_tied(model),
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(
            f"method.type=lora cannot be applied to {type(model).__name__} ({reason}); choose other "
            "method.target_modules, or use type: full"
        ) from None
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # peft creates them in fp32 if the base is quantized
    if method.use_dora:
        patch_dora(adapted)
    return adapted


def adapter_problem(model: PeftModel, job: JobSpec) -> str | None:
    """Return why training cannot start from `method.adapter` of a job, with the remedy; None if it can.

    Compares the adapter's configuration, tensor shapes and base model with those of the job; reads headers
    only.

    Args:
        model: The adapted model, as `adapt` returns it; it may be on the meta device.
        job: Names the adapter and the base model.
    """
    from peft import PeftConfig, get_peft_model_state_dict

    if job.method.adapter is None:
        return None
    folder, where = resolve(job.method.adapter), f"method.adapter={job.method.adapter}"
    try:
        found = PeftConfig.from_pretrained(str(folder))
        if not (folder / WEIGHTS).is_file():
            return f"{where} has no {WEIGHTS}; name a folder that has one, or save the adapter as safetensors"
        stored = shapes_in(folder / WEIGHTS)
    except UnreadableError as error:
        return f"{where} {error}"
    except Exception as error:  # peft raises errors of many classes
        reason = " ".join(str(error).split())[:200]
        return f"{where} is not an adapter that can be read ({reason}); name a folder with {WEIGHTS}"
    # The stored matrices only have their meaning with the same rank, alpha, rsLoRA and DoRA settings.
    mine = model.peft_config["default"]
    differing = [
        f"{field} {getattr(found, attribute, None)}, and method.{field} is {getattr(mine, attribute)}"
        for field, attribute in _SAME.items()
        if getattr(found, attribute, None) != getattr(mine, attribute)
    ]
    if differing:
        return f"{where} has {'; '.join(differing)}; write the adapter's in this job"
    # Names as in adapter files, without the adapter name "default"; shapes only, so meta tensors suffice.
    kept = get_peft_model_state_dict(model, save_embedding_layers=False)
    other = WeightsMismatch.between(stored, {name: weight.shape for name, weight in kept.items()})
    if other != WeightsMismatch():
        return (
            f"{where} does not match method.target_modules and method.train_embeddings: it "
            f"{other.explain('the adapter of this job')}; write the adapter's targets in this job, or name "
            "its base model"
        )
    known = folder / base_model_id.BASE_MODEL_FILE
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != base_model_id.identity(job):
        return (
            f"{where} was trained with another base model than model.path={job.model.path}; name that one, "
            "or "
            "another adapter"
        )
    return None


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Copy adapter weights from a folder into a model; `adapter_problem` must have returned None for it.

    A collective call under ZeRO-3: every rank must make it.

    Args:
        model: The adapted model, as `adapt` returns it; may be partitioned by ZeRO-3.
        folder: An adapter in peft's format.
    """
    from deepspeed import zero
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    kept = get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), save_embedding_layers=False
    )
    for name, parameter in kept.items():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        # Rank 0 writes the gathered parameter; leaving the context broadcasts and partitions it again.
        with torch.no_grad(), zero.GatheredParameters(partitioned, modifier_rank=0):
            if not partitioned or dist.get_rank() == 0:
                parameter.copy_(stored[name])


def num_adapter_params(model: nn.Module) -> int:
    """Return the number of elements of all LoRA matrices, at full size even if ZeRO-3 partitions them."""
    # Under ZeRO-3 numel() of a partitioned parameter is 0; DeepSpeed stores the full size in ds_numel.
    return sum(
        int(getattr(parameter, "ds_numel", parameter.numel()))
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    )


def adapts_last_matmul(model: nn.Module) -> bool:
    """Tell whether the last matmul of each layer, the MLP's `down_proj`, has an adapter."""
    return any(".down_proj.lora_A." in name for name, _ in model.named_parameters())


def targets(model: nn.Module, method: MethodSpec) -> str | list[str]:
    """Return the target modules in the format of peft's `LoraConfig.target_modules`.

    Raises:
        SpecError: No linear layer has a name in `method.target_modules`; the error lists the existing names.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if method.target_modules == "all-linear":
        quantized = [name for name, module in linear.items() if is_quantized(module)]
        return quantized or "all-linear"  # peft's "all-linear" matches only torch.nn.Linear and Conv1D
    if method.target_modules == "attention":
        # Match parent modules, not the last component: some models use the same name in attention and MLP.
        found = [
            name
            for name in linear
            if any(part in parent for parent in name.split(".")[:-1] for part in _ATTENTION)
        ]
        if not found:
            raise SpecError(
                f"method.target_modules=attention: {type(model).__name__} has no attention; name modules: "
                f"{', '.join(_names(linear))}"
            )
        return found
    missing = [
        name for name in method.target_modules if not any(f".{each}".endswith(f".{name}") for each in linear)
    ]
    if missing:
        raise SpecError(
            *(
                f"method.target_modules: {type(model).__name__} has no linear layer {name}; it has "
                f"{', '.join(_names(linear))}"
                for name in missing
            )
        )
    return list(method.target_modules)


def _names(linear: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in linear})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or is_quantized(module)


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Return the last name component of the embedding and of the LM head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    by_module = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [by_module[id(module)] for module in wanted if module is not None]


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
