"""Weights as Hugging Face safetensors: one file, or several with an index, each put together by itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from orchestrator.errors import SpecError, TrainingError

_INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SLACK_BYTES = 2**16  # config.json, model card and marker
_HEAD_BYTES = 512  # of a tensor, in a file's head and in the index
Convert = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class WeightFormat:
    """How weights are written: their number format, and how large a file becomes at most."""

    dtype: torch.dtype
    max_shard_bytes: int

    def of(self, tensor: Any) -> torch.dtype:
        """Return the number format of a tensor in the file; integers stay what they are."""
        return self.dtype if tensor.dtype.is_floating_point else tensor.dtype


def shard_bytes(text: str) -> int:
    """Return the bytes of a size such as 2GB or 500MB.

    Raises:
        SpecError: It is none, or too small for a file.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if found < 1:
        raise SpecError(
            f"--shard-size {text} is not a size; write a number with its unit, such as 2GB or 500MB"
        )
    return found


def stored_once(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out all but the first name of tied tensors; transformers ties them again when it loads."""
    first_name = {_identity(tensor): name for name, tensor in reversed(list(weights.items()))}
    return {name: tensor for name, tensor in weights.items() if first_name[_identity(tensor)] == name}


def _identity(tensor: Any) -> Any:
    """Return what two names of one tensor have in common; a lazy one of DeepSpeed is one object."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.numel():
        return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
    return id(tensor)


def bytes_of(weights: Mapping[str, Any], form: WeightFormat) -> int:
    """Return the size of weights as they will be written, with the heads of their files."""
    sizes = (tensor.shape.numel() * form.of(tensor).itemsize for tensor in weights.values())
    return int(sum(sizes)) + _HEAD_BYTES * len(weights)


def require_room(folder: Path, needed_bytes: int, target: Path) -> None:
    """Find out that an export does not fit before it is written.

    Raises:
        TrainingError: The disk has less room than it needs.
    """
    if shutil.disk_usage(folder).total == 0:  # some network file systems do not say
        return
    free, needed = shutil.disk_usage(folder).free, needed_bytes + _SLACK_BYTES
    if free < needed:
        raise TrainingError(
            f"the export to {target} needs {needed / 2**20:,.1f} MiB, and {target.parent} has "
            f"{free / 2**20:,.1f} MiB free; make room, or name another folder with --to"
        )


def write_weights(weights: Mapping[str, Any], folder: Path, form: WeightFormat, convert: Convert) -> int:
    """Write weights as model.safetensors, or as shards with an index where one file would be too large.

    Args:
        weights: Tensors by name, each tied one once; each is read when its `contiguous` is called.
        folder: Where to write.
        form: Number format and size of files.
        convert: From the names and shapes of the running model to those of published files. It is given the
            tensors of one file at a time.

    Returns:
        The number of parameters.

    Raises:
        TrainingError: A weight is too large for the number format.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {
        name: torch.empty(tensor.shape, dtype=form.of(tensor), device="meta")
        for name, tensor in weights.items()
    }
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=form.max_shard_bytes
    )
    places: dict[str, str] = {}
    total_bytes = parameters = 0
    for file, names in split.filename_to_tensors.items():
        read = {name: _cast(name, weights[name].contiguous(), empty[name].dtype) for name in names}
        converted = {name: _own(tensor) for name, tensor in convert(read).items()}
        save_file(converted, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(converted, file)
        parameters += sum(tensor.numel() for tensor in converted.values())
        total_bytes += sum(tensor.numel() * tensor.itemsize for tensor in converted.values())
    if split.is_sharded:
        metadata = {"total_parameters": parameters, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return parameters


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a number format.

    Raises:
        TrainingError: fp16 cannot hold one of its values.
    """
    cast = tensor.to(dtype)
    if dtype is torch.float16 and (lost := int((cast.isinf() & tensor.isfinite()).sum())):
        raise TrainingError(
            f"{lost} values of {name} are beyond what fp16 can hold (65504); export with --dtype bf16 or fp32"
        )
    return cast


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that fills its memory: safetensors refuses views of one that is larger."""
    whole = tensor.contiguous()
    fills = whole.untyped_storage().nbytes() == whole.numel() * whole.itemsize
    return whole if fills else whole.clone()


def published_names(skeleton: Any | None) -> Convert:
    """Return how the tensors of a model become those of its published files.

    transformers 5 joins the experts of a layer, and other weights, when it loads them; published files,
    earlier versions and inference servers have them apart.

    Args:
        skeleton: The model without memory for its weights; None where it cannot be built so.
    """
    if skeleton is None:
        return lambda tensors: tensors
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensors: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = revert_weight_conversion(skeleton, tensors)
        return found

    return convert
