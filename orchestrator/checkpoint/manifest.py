"""The manifest of a checkpoint: its tensors, the files with their parts, and who wrote them.

It is the only thing that publishes a checkpoint, is JSON, and is read without torch or DeepSpeed. Its last
line holds a digest of the others, so that a flipped bit in it is found like one in any other file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from orchestrator.errors import TrainingError

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the format. Format 1 was DeepSpeed's files of each rank."""
MODEL, OPTIMIZER, BLOCKS = "model", "optimizer", "blocks"
"""First parts of the names of tensors; see `training_state`."""
_DIGEST_LINE = re.compile(rb'(?s)(?P<body>.*)\n"sha256":"(?P<digest>[0-9a-f]{64})"}\n')


class DamagedCheckpointError(TrainingError):
    """Files of a checkpoint are missing or damaged; each problem ends with `; ` and the remedy."""


Chunk = tuple[int, int, int, int]
"""(first element in the flattened tensor, number of elements, number of the file, first byte in it)."""


class TensorEntry(TypedDict):
    """A logical tensor: its dtype as safetensors names it, its shape, and the chunks that it consists of."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


class TensorFile(TypedDict):
    """A file of tensors: its size, where its table of digests begins, and the digest of the table."""

    name: str
    bytes: int
    table_start: int
    table_digest: str


class Manifest(TypedDict):
    """Content of manifest.json.

    Attributes:
        format: Version of the format.
        step: Number of completed steps.
        attempt: Number of the attempt that wrote it.
        written_by: Versions of packages, number of workers and ZeRO stage; nothing depends on them.
        engine: Counters and the loss scale, by name.
        optimizer: Format of the optimizer's state (`engine.optimizer_state`).
        tied: Name under which a tied weight is saved, by its other names.
        layout: ZeRO stage and workers that 8-bit state fits; None for other optimizers, which fit any.
        files: The files, in the order of their numbers.
        tensors: The tensors by name.
    """

    format: int
    step: int
    attempt: int
    written_by: dict[str, Any]
    engine: dict[str, Any]
    optimizer: str
    tied: dict[str, str]
    layout: list[int] | None
    files: list[TensorFile]
    tensors: dict[str, TensorEntry]


def dumps(manifest: Mapping[str, Any]) -> bytes:
    """Return the content of manifest.json: a line for each field, and a digest of them."""
    fields = ",\n".join(
        f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in manifest.items()
    )
    body = f"{{{fields},".encode()
    return body + f'\n"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def loads(content: bytes) -> Manifest:
    """Return a manifest.

    Raises:
        ValueError: It is not what was written, or of another format; the message says which.
    """
    found = _DIGEST_LINE.fullmatch(content)
    if found is None or hashlib.sha256(found["body"]).hexdigest() != found["digest"].decode():
        raise ValueError(_not_a_manifest(content))
    manifest: dict[str, Any] = json.loads(content)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"it is of format {manifest.get('format')}, and this version reads format {FORMAT}")
    return cast(Manifest, manifest)


def _not_a_manifest(content: bytes) -> str:
    try:
        is_old = "world_size" in json.loads(content)
    except (ValueError, RecursionError, TypeError):
        is_old = False
    return (
        "it is of format 1, DeepSpeed's files of each rank, which an earlier version wrote"
        if is_old
        else "it is not what was written"
    )


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: It is missing, damaged, or of another format.
        TrainingError: It cannot be read.
    """
    file = checkpoint / MANIFEST
    try:
        return loads(file.read_bytes())
    except FileNotFoundError as error:
        problem = error.strerror
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingError(f"{file} cannot be read ({reason}); make it readable on every node") from None
    except ValueError as error:
        problem = str(error)
    raise DamagedCheckpointError(f"{file} cannot be read ({problem}); {remedy(checkpoint)}")


def remedy(checkpoint: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    return f"remove {checkpoint} to use the checkpoint before it"
