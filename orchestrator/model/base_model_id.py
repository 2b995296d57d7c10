"""Fingerprint of the base model of an adapter: its configuration, and head and tail of its weight files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypedDict

from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec

BASE_MODEL_FILE = "base.json"  # file in run directories and adapter folders
_HEAD_BYTES = 2**20  # a safetensors file begins with the names, shapes and offsets of its tensors
_NOT_WEIGHTS = frozenset({"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"})


class WeightFile(TypedDict):
    """Size of a weight file, and a hash of its first and last MiB."""

    bytes: int
    sha256_of_ends: str


def identity(job: JobSpec) -> dict[str, object]:
    """Return a fingerprint that identifies the base model of a job without reading all of its weights.

    Args:
        job: Its `model.path` is a folder or a hub name.

    Returns:
        JSON object. `config`: SHA-256 of the configuration. `weights`: for a folder, the result of
        `weight_files`; for random weights, the seed. `commit`: the commit of a hub model. `vocabulary`: rows
        that the tokenizer needs, if model.resize_embeddings is set.
    """
    from transformers import AutoConfig

    from orchestrator.model.vocabulary import tokenizer_rows

    model = job.model
    path = resolve(model.path)
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=model.trust_remote_code)
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_WEIGHTS}
    found: dict[str, object] = {
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    }
    if model.resize_embeddings:
        found["vocabulary"] = tokenizer_rows(model)
    if model.weights == "random":
        return {**found, "weights": f"random, seed {job.run.seed}"}
    if path.is_dir():
        return {**found, "weights": weight_files(path)}
    return {**found, "commit": getattr(config, "_commit_hash", None)}


def weight_files(folder: Path) -> dict[str, WeightFile]:
    """Return size in bytes, and SHA-256 of the first and last MiB, of each weight file by its name."""
    files = sorted(each for each in folder.iterdir() if each.suffix in (".safetensors", ".bin"))
    return {each.name: _describe(each) for each in files}


def _describe(file: Path) -> WeightFile:
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
        opened.seek(max(0, size - _HEAD_BYTES))
        tail = opened.read()
    return {"bytes": size, "sha256_of_ends": hashlib.sha256(head + tail).hexdigest()}
