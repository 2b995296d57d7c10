"""From a run's checkpoint to an adapter that peft loads, or to the base model with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec
from orchestrator.errors import TrainingError
from orchestrator.model import base_model_id
from orchestrator.model.adapters import WEIGHTS
from orchestrator.model.build import base_model, skeleton


def write_adapter(
    job: JobSpec, weights: dict[str, Any], folder: Path, dtype: torch.dtype, identity: Mapping[str, Any]
) -> int:
    """Write an adapter in peft's format, with what it has to be loaded onto.

    Args:
        job: The run's job.
        weights: The trained weights of a checkpoint by name.
        folder: Where to write.
        dtype: Number format of the adapter.
        identity: Of the model beside which it was trained.

    Returns:
        The number of parameters.
    """
    from peft import get_peft_model_state_dict

    model = skeleton(job)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    kept = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    # Tied matrices are one tensor under two names, and a file of safetensors stores each by itself.
    tensors = {name: weight.to(dtype).clone() for name, weight in kept.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    is_shipped = job.model.path.startswith("builtin/")  # a name that nobody else knows
    config.base_model_name_or_path = str(resolve(job.model.path)) if is_shipped else job.model.path
    config.inference_mode = True
    config.save_pretrained(folder)
    (folder / base_model_id.BASE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def merged_model(job: JobSpec, adapter: Path, dtype: torch.dtype) -> Any:
    """Return the base model with an adapter added to its weights.

    Args:
        job: The run's job.
        adapter: Folder of the adapter.
        dtype: Number format of the weights.

    Raises:
        TrainingError: The base model is not the one that the adapter was trained beside.
    """
    from peft import PeftModel

    known = json.loads((adapter / base_model_id.BASE).read_text(encoding="utf-8"))
    if known != (found := base_model_id.identity(job)):
        differing = sorted(key for key in known.keys() | found.keys() if known.get(key) != found.get(key))
        raise TrainingError(
            f"model.path={job.model.path} is not the model that the adapter was trained beside "
            f"({', '.join(differing)} differ); bring that one back, or export without --merge"
        )
    return PeftModel.from_pretrained(base_model(job, dtype), str(adapter)).merge_and_unload()
