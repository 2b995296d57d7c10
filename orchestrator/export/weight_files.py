"""Write weights as Hugging Face safetensors: one file, or shards with an index, one in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import save_file

from orchestrator.errors import SpecError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_OTHER_FILES_BYTES = 2**16  # estimate for config.json, model card and marker
_HEADER_BYTES = 512  # estimate for a tensor's entries in the header of its file and in the index
Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class LazyTensor(Protocol):
    """A tensor that is read when `contiguous` is called: a torch.Tensor, or DeepSpeed's of a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the checkpoint."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor, also if the checkpoint has partitions of it."""

    def contiguous(self) -> torch.Tensor:
        """Read the tensor."""


@dataclass(frozen=True)
class WeightFormat:
    """The dtype of floating-point weights in the files, and the maximum size of a file."""

    dtype: torch.dtype
    max_shard_bytes: int

    def dtype_of(self, tensor: LazyTensor) -> torch.dtype:
        """Return the dtype of a tensor in the file; integers keep theirs."""
        return self.dtype if tensor.dtype.is_floating_point else tensor.dtype


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as 2GB or 500MB.

    Raises:
        SpecError: The text is not a size, or the size is zero.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise SpecError(f"--shard-size {text} is not a size; use a number with a unit, such as 2GB or 500MB")
    return size


def without_tied_duplicates(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Keep only the first name of tied tensors; transformers ties them again when it loads the model."""
    first_name = {_identity(tensor): name for name, tensor in reversed(list(weights.items()))}
    return {name: tensor for name, tensor in weights.items() if first_name[_identity(tensor)] == name}


def _identity(tensor: LazyTensor) -> Hashable:
    """Return a key that is equal for tied tensors: the memory of a tensor, the object if it is lazy."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.numel():
        return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
    return id(tensor)


def total_bytes(weights: Mapping[str, LazyTensor], weight_format: WeightFormat) -> int:
    """Return the size of the weights in files, with an estimate for the headers."""
    sizes = (tensor.shape.numel() * weight_format.dtype_of(tensor).itemsize for tensor in weights.values())
    return int(sum(sizes)) + _HEADER_BYTES * len(weights)


def require_free_space(directory: Path, weight_bytes: int, target: Path) -> None:
    """Raise before writing if an export does not fit on the disk.

    Raises:
        TrainingError: The disk has too little free space.
    """
    usage, needed = shutil.disk_usage(directory), weight_bytes + _OTHER_FILES_BYTES
    if usage.total == 0:  # some network file systems do not report their size
        return
    if usage.free < needed:
        raise TrainingError(
            f"the export to {target} needs {needed / 2**20:,.1f} MiB, and {target.parent} has "
            f"{usage.free / 2**20:,.1f} MiB free; free some space, or name another directory with --to"
        )


def write_weights(
    weights: Mapping[str, LazyTensor], directory: Path, weight_format: WeightFormat, convert: Convert
) -> int:
    """Write weights as model.safetensors, or as shards with an index if one file would be too large.

    Args:
        weights: Tensors by name, without duplicates of tied ones; each is read when its shard is written.
        directory: Where to write.
        weight_format: Dtype and maximum size of files.
        convert: Converts names and shapes of the running model to those of published files; called with
            the tensors of one file at a time.

    Returns:
        The number of parameters.

    Raises:
        TrainingError: A value is out of range of the dtype.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    # Meta tensors have shapes and dtypes without memory, which is all that the split needs.
    meta = {
        name: torch.empty(tensor.shape, dtype=weight_format.dtype_of(tensor), device="meta")
        for name, tensor in weights.items()
    }
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=weight_format.max_shard_bytes
    )
    weight_map: dict[str, str] = {}
    size = parameters = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _cast(name, weights[name].contiguous(), meta[name].dtype) for name in names}
        converted = {name: _owning(tensor) for name, tensor in convert(tensors).items()}
        save_file(converted, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(converted, file)
        parameters += sum(tensor.numel() for tensor in converted.values())
        size += sum(tensor.numel() * tensor.itemsize for tensor in converted.values())
    if split.is_sharded:
        metadata = {"total_parameters": parameters, "total_size": size}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return parameters


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor.

    Raises:
        TrainingError: A finite value is infinite in fp16.
    """
    cast = tensor.to(dtype)
    if dtype is torch.float16 and (overflows := int((cast.isinf() & tensor.isfinite()).sum())):
        raise TrainingError(
            f"{overflows} values of {name} exceed the range of fp16 (65504); use --dtype bf16 or fp32"
        )
    return cast


def _owning(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that fills its storage: safetensors refuses views of a larger one."""
    whole = tensor.contiguous()
    fills = whole.untyped_storage().nbytes() == whole.numel() * whole.itemsize
    return whole if fills else whole.clone()


def to_published_format(model: PreTrainedModel | None) -> Convert:
    """Return the conversion from the tensors of a model to those of its published files.

    transformers 5 fuses the experts of a layer, and other weights, when it loads them. Published files,
    earlier versions and inference servers have them separately: experts as [rows, columns] each instead of
    one [experts, rows, columns].

    Args:
        model: The model, which may be on the meta device; None if it cannot be built there.
    """
    if model is None:
        return lambda tensors: tensors
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        published: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
        return published

    return convert
