"""Checkpoints on storage that every node shares: written by all ranks, published by one rename, verified before use.

    checkpoints/step-00000020/manifest.json      step, world size, and the size and SHA-256 of every shard
    checkpoints/step-00000020/shards/            DeepSpeed's files, one set a rank
    checkpoints/step-00000040.attempt-2.partial  not published yet; never read

All functions that take an engine are collective: every rank calls them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist

from orchestrator.errors import TrainingError

MANIFEST = "manifest.json"
SHARDS = "shards"


def published(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = folder.glob("step-*/" + MANIFEST) if folder.is_dir() else []
    return sorted((manifest.parent for manifest in found if "." not in manifest.parent.name), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint holds."""
    return int(checkpoint.name.removeprefix("step-"))


def clean(folder: Path, keep: int) -> None:
    """Remove what earlier attempts left unpublished, and all but the newest checkpoints."""
    for draft in folder.glob("*.partial"):
        shutil.rmtree(draft, ignore_errors=True)
    for old in published(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def save(engine: Any, folder: Path, step: int, attempt: int, permit: Callable[[], None]) -> Path:
    """Write and publish a checkpoint.

    Args:
        engine: DeepSpeed's engine.
        folder: The run's folder of checkpoints.
        step: Steps that are done.
        attempt: Number of this attempt; two attempts never write into one folder.
        permit: Called on rank 0 right before publishing; raises where a newer attempt has taken over.

    Returns:
        The published folder.

    Raises:
        TrainingError: It cannot be written; what was published before is untouched.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f"step-{step:08d}.attempt-{attempt}.partial"
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(draft), tag=SHARDS, client_state={"step": step}, save_latest=False)
        dist.barrier()
        entries = _describe_my_share(draft / SHARDS)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        shutil.rmtree(draft, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} cannot be written to {folder} ({reason}); make room or repair the "
            "storage, and run the job again: it goes on from the last published checkpoint"
        ) from error
    gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, entries)
    if dist.get_rank() == 0:
        files = {name: entry for part in gathered for name, entry in part.items()}
        _require_all_shards(files, step)
        permit()
        _write_manifest(draft, {"step": step, "world_size": dist.get_world_size(), **_stage(engine), "files": files})
        if final.exists():  # the same step, published by an attempt that ended before it could say so
            shutil.rmtree(final)
        draft.rename(final)
        _sync(folder)
    dist.barrier()
    return final


def load(engine: Any, checkpoint: Path) -> int:
    """Verify a checkpoint and restore the engine from it.

    Returns:
        The steps that are done.

    Raises:
        TrainingError: A file is missing or not what was written, or the checkpoint belongs to another layout.
    """
    manifest = read_manifest(checkpoint)
    wanted = {"world_size": dist.get_world_size(), **_stage(engine)}
    for key, value in wanted.items():
        if manifest[key] != value:
            raise TrainingError(
                f"{checkpoint} was written with {key}={manifest[key]}, and this run has {key}={value}; run it with the "
                "same layout, or export the checkpoint and train on from the exported model"
            )
    problems: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(problems, _verify_my_share(checkpoint, manifest["files"]))
    found = [problem for part in problems for problem in part]
    if found:
        raise TrainingError(*found, f"remove {checkpoint} and run the job again: it goes on from the one before")
    engine.load_checkpoint(str(checkpoint), tag=SHARDS)
    return int(manifest["step"])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises:
        TrainingError: The manifest cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{checkpoint / MANIFEST} cannot be read ({error}); remove {checkpoint} to go on from the one before"
        ) from None
    return manifest


def verify(checkpoint: Path) -> list[str]:
    """Return a sentence for each file that is missing or not what was written; in one process."""
    files = read_manifest(checkpoint)["files"]
    return [problem for name, entry in files.items() if (problem := _problem(checkpoint, name, entry))]


def _stage(engine: Any) -> dict[str, int]:
    return {"zero_stage": int(engine.zero_optimization_stage())}


def _describe_my_share(shards: Path) -> dict[str, Any]:
    """Read back, flush and hash this rank's share of the files, whoever wrote them."""
    names = sorted(path.name for path in shards.iterdir())
    return {name: _describe(shards / name) for name in names[dist.get_rank() :: dist.get_world_size()]}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _require_all_shards(files: dict[str, Any], step: int) -> None:
    shards = [name for name in files if name.endswith("optim_states.pt")]
    if len(shards) != dist.get_world_size():
        raise TrainingError(
            f"the checkpoint of step {step} has the optimizer shards of {len(shards)} ranks, and there are "
            f"{dist.get_world_size()}: the nodes do not write to one storage; set checkpoint.storage to a folder that all "
            "nodes mount"
        )


def _write_manifest(draft: Path, manifest: dict[str, Any]) -> None:
    with (draft / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify_my_share(checkpoint: Path, files: dict[str, Any]) -> list[str]:
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    return [problem for name in mine if (problem := _problem(checkpoint, name, files[name]))]


def _problem(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = checkpoint / SHARDS / name
    try:
        found = _describe(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}), and the checkpoint needs it"
    if found != entry:
        return f"{path} is not what was written: {found['bytes']} bytes, and {entry['bytes']} with another hash were"
    return None
