"""Functions that damage the files of a model folder, each in one way, and jobs that use the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.config.schema import JobSpec
from tests.invariant import material

FILE = "model.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
STAGE_2 = {"zero_optimization": {"stage": 2}}
Tensors = dict[str, torch.Tensor]


def job(folder: Path, **sections: Any) -> JobSpec:
    document = material.job(folder, 1, {"zero_stage": 2}, **sections)
    return JobSpec.model_validate_json(json.dumps(document))


def rewrite(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return apply


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def under(prefix: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return rewrite(change)


def shard(folder: Path) -> None:
    """Split the weights into two safetensors files with an index."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    where = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def shard_and(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard(folder)
        change(folder)

    return apply


def pickle(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def pointer(folder: Path) -> None:
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lora_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
