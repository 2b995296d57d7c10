"""From a run's checkpoint to a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.tokenize import load_tokenizer
from orchestrator.errors import TrainingError
from orchestrator.model.build import load_config, torch_dtype
from orchestrator.spec import JobSpec
from orchestrator.train import checkpoint
from orchestrator.train.adapter import write_adapter, write_merged

_MAX_SHARD = "5GB"


def export(
    job: JobSpec,
    dtype: Literal["bf16", "fp16", "fp32"],
    saved: Path,
    to: Path,
    base: Mapping[str, Any] | None = None,
    merge: bool = False,
) -> Path:
    """Write the model of a checkpoint as Hugging Face safetensors, with configuration and tokenizer.

    Of a run that trained adapters, write these in peft's format, or with `merge` the base model with them
    added to its weights.

    One tensor at a time is put together from the shards, so host memory holds one output file and not the
    model twice. Needs no device and no process group.

    Args:
        job: The run's job.
        dtype: Number format of the weights.
        saved: A published checkpoint.
        to: Folder to write; replaced where it exists.
        base: Of a run that trained adapters, the identity of the model beside which it did.
        merge: Whether adapters are merged into the base model.

    Returns:
        The folder.

    Raises:
        TrainingError: The checkpoint is damaged, or the folder cannot be written.
    """
    problems = checkpoint.verify(saved)
    if problems:
        raise TrainingError(*problems)
    draft = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if base is not None:
            _write_adapter(job, saved, draft, torch_dtype(dtype), base, merge)
        else:
            _write_model(job, saved, draft, torch_dtype(dtype))
        load_tokenizer(job.model).save_pretrained(draft)
        shutil.rmtree(to, ignore_errors=True)
        draft.rename(to)
    except OSError as error:
        raise TrainingError(
            f"the model cannot be exported to {to} ({error.strerror}); make room or name another "
            "folder with --to"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return to


def _write_model(job: JobSpec, saved: Path, folder: Path, dtype: Any) -> None:
    _write_weights(saved, folder, dtype)
    config = load_config(job.model)
    config.dtype = dtype
    config.architectures = config.architectures or [_architecture(config)]
    config.save_pretrained(folder)


def _write_adapter(
    job: JobSpec, saved: Path, folder: Path, dtype: Any, base: Mapping[str, Any], merge: bool
) -> None:
    weights = fp32_weights(saved, only_trained=True)
    if not merge:
        write_adapter(job, weights, folder, dtype, base)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as beside:
        write_adapter(job, weights, Path(beside), dtype, base)
        write_merged(job, Path(beside), folder, dtype, _MAX_SHARD)


def _architecture(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def fp32_weights(saved: Path, only_trained: bool = False) -> dict[str, Any]:
    """Return the weights of a checkpoint by name, each read when its `contiguous` is called.

    Tied weights are one object under several names.

    Args:
        saved: A published checkpoint.
        only_trained: Whether frozen weights were left out of it.

    Raises:
        TrainingError: It is of an earlier version, which did not save all names.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if checkpoint.read_manifest(saved)["zero_stage"] == 0:
        return _unpartitioned_weights(saved)
    lazy: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(saved), tag=checkpoint.SHARDS, exclude_frozen_parameters=only_trained, lazy_mode=True
    )
    return lazy


def _unpartitioned_weights(saved: Path) -> dict[str, Any]:
    """Return the weights that rank 0 wrote under ZeRO-0: those of the optimizer, where it has its own."""
    import torch

    (file,) = (saved / checkpoint.SHARDS).glob("*model_states.pt")
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    first: dict[int, Any] = {}
    weights = {name: first.setdefault(tensor.data_ptr(), tensor) for name, tensor in state["module"].items()}
    if "fp32_groups" not in state["optimizer"]:
        return weights
    if checkpoint.FP32_NAMES not in state:
        raise TrainingError(
            f"{saved} does not say which of its fp32 weights is which, as an earlier version wrote it; "
            "export it with that version"
        )
    # By name: Muon's weights come in groups of their own, and quantised layers save more than weights.
    exact = (tensor.detach() for group in state["optimizer"]["fp32_groups"] for tensor in group)
    replaced = {
        id(weights[name]): tensor for name, tensor in zip(state[checkpoint.FP32_NAMES], exact, strict=True)
    }
    return {name: replaced.get(id(tensor), tensor) for name, tensor in weights.items()}


def _write_weights(saved: Path, folder: Path, dtype: Any) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    lazy = fp32_weights(saved)
    first_name = {id(tensor): name for name, tensor in reversed(lazy.items())}
    # A tied tensor is stored once, under its first name; transformers ties it again when it loads.
    kept = {name: tensor for name, tensor in lazy.items() if first_name[id(tensor)] == name}
    empty = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.dtype.is_floating_point else tensor.dtype)
        for name, tensor in kept.items()
    }
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=_MAX_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: kept[name].contiguous().to(empty[name].dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
