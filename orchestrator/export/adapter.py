"""Write a checkpoint's adapter in peft's format, or merge it into its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec
from orchestrator.errors import TrainingError
from orchestrator.export.base_files import write_json
from orchestrator.export.weight_files import LazyTensor
from orchestrator.model import base_model_id
from orchestrator.model.adapters import WEIGHTS
from orchestrator.model.build import base_model, build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_adapter(
    job: JobSpec,
    weights: Mapping[str, LazyTensor],
    directory: Path,
    dtype: torch.dtype,
    identity: Mapping[str, object],
) -> int:
    """Write an adapter in peft's format, and the identity of its base model.

    Args:
        job: The run's job.
        weights: The trained weights of a checkpoint by name.
        directory: Where to write.
        dtype: Dtype of the adapter.
        identity: Identity of the base model.

    Returns:
        The number of parameters.
    """
    from peft import get_peft_model_state_dict

    model = build_on_meta(job)
    state = {name: weight.contiguous() for name, weight in weights.items()}
    adapter_state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    # clone: tied matrices are one tensor under two names, which safetensors refuses.
    tensors = {name: weight.to(dtype).clone() for name, weight in adapter_state.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    # A builtin name means nothing outside of this package; its path does, at least on this machine.
    is_builtin = job.model.path.startswith("builtin/")
    config.base_model_name_or_path = str(resolve(job.model.path)) if is_builtin else job.model.path
    config.inference_mode = True
    config.save_pretrained(str(directory))
    write_json(directory / base_model_id.BASE_MODEL_FILE, identity)
    return sum(tensor.numel() for tensor in tensors.values())


def merged_model(job: JobSpec, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model with an adapter merged into its weights.

    Args:
        job: The run's job.
        adapter: Directory of the adapter.
        dtype: Dtype of the weights.

    Raises:
        TrainingError: The base model is not the one that the adapter was trained with.
    """
    from peft import PeftModel

    expected = json.loads((adapter / base_model_id.BASE_MODEL_FILE).read_text(encoding="utf-8"))
    actual = base_model_id.identity(job)
    if expected != actual:
        names = expected.keys() | actual.keys()
        differing = sorted(name for name in names if expected.get(name) != actual.get(name))
        raise TrainingError(
            f"model.path={job.model.path} is not the base model that the adapter was trained with "
            f"({', '.join(differing)} differ); restore that model, or export without --merge"
        )
    adapted = PeftModel.from_pretrained(base_model(job, dtype), str(adapter))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
