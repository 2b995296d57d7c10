"""Finds the weight files of a model as transformers does, and reads the shapes of their tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAMES = ("model.safetensors", "model.safetensors.index.json")
_OLD_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LFS = b"version https://git-lfs"
COPY_AGAIN = "copy the model again, whole"
_SHOWN = 3

Shapes = dict[str, torch.Size]


class UnreadableError(Exception):
    """The files of a model cannot be read; the message names the file and the remedy."""


def weight_files(model: ModelSpec, config: PretrainedConfig, download: bool) -> list[Path] | None:
    """Return the weight files that transformers reads; None for a hub model that is not cached.

    Raises:
        UnreadableError: There are no weight files, or some are missing.
    """
    # The order of transformers: an explicit name in config.json, safetensors, then pickles; a single file
    # before an index of shards.
    explicit = getattr(config, "transformers_weights", None)
    for name in [explicit] if explicit else [*_NAMES, *_OLD_NAMES]:
        file = _file_of(model, name, download)
        if file is None:
            continue
        if not name.endswith(".json"):
            return [file]
        return _shards(model, file, download)
    folder = resolve(model.path)
    if not folder.is_dir() and not download:
        return None
    raise UnreadableError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.glob("*.safetensors")) if folder.is_dir() else []
    if shards:
        return (
            f"has {len(shards)} files such as {shards[0]} and no {_NAMES[1]}, which says what belongs to the "
            f"model; {COPY_AGAIN}"
        )
    return (
        f"has no weights ({', '.join([*_NAMES, *_OLD_NAMES])}: none is there); {COPY_AGAIN}, or use "
        "model.weights: random to train from scratch"
    )


def _file_of(model: ModelSpec, name: str, download: bool) -> Path | None:
    """Return the path of a file of a model; None if it does not exist or is not cached."""
    folder = resolve(model.path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            str(folder),
            name,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=download,
        )
    except OSError as error:
        if not download:
            return None
        reason = " ".join(str(error).split())[:200]
        raise UnreadableError(f"cannot be fetched from the hub ({reason}); name a folder") from None
    return None if found is None else Path(found)


def _shards(model: ModelSpec, index: Path, download: bool) -> list[Path] | None:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(
            f"has an index that cannot be read: {index.name} ({error!r}); {COPY_AGAIN}"
        ) from None
    found = {name: _file_of(model, name, download) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing and not resolve(model.path).is_dir() and not download:
        return None
    if missing:
        raise UnreadableError(
            f"lacks {len(missing)} of the {len(names)} files that {index.name} names ({some_of(missing)}); "
            f"{COPY_AGAIN}"
        )
    return [file for file in found.values() if file is not None]


def shapes_in(file: Path) -> Shapes:
    """Return the shape of every tensor in a weight file, by name, without reading tensor data.

    Raises:
        UnreadableError: The file is damaged or truncated, or is not a weight file.
    """
    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_LFS)) == _LFS
        if is_pointer:
            raise UnreadableError(
                f"has {file.name} as a pointer of Git LFS and not as weights; run `git lfs pull` there"
            )
        return _shapes_of_safetensors(file) if file.suffix == ".safetensors" else _shapes_of_pickle(file)
    except UnreadableError:
        raise
    except Exception as error:  # safetensors and pickle raise errors of many classes
        reason = " ".join((str(error) or type(error).__name__).split())[:150]
        raise UnreadableError(
            f"has a file that cannot be read: {file.name} ({reason}); it is damaged or not whole, so copy it "
            "again"
        ) from None


def _shapes_of_safetensors(file: Path) -> Shapes:
    with safe_open(file, framework="pt") as opened:
        return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _shapes_of_pickle(file: Path) -> Shapes:
    stored = torch.load(file, map_location="meta", weights_only=True)
    return {name: tensor.shape for name, tensor in stored.items()}


def some_of(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
