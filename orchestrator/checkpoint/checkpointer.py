"""Save and load checkpoints: all ranks write shards to shared storage, and rank 0 publishes by one rename.

All functions are collective: every rank calls them, and an error on one rank is raised on all, so that no
rank waits in a collective for one that is gone.

Saving: create a draft directory -> DeepSpeed writes the shards -> flush and hash them, each rank its share ->
write the manifest -> rename. A crash at any time leaves the published checkpoints as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import distributed as dist

from orchestrator.atomic_files import write_json
from orchestrator.checkpoint.checkpoint_dir import (
    MANIFEST,
    SHARDS,
    FileEntry,
    Layout,
    Manifest,
    error_text,
    file_entry,
    file_problems,
    read_manifest,
    remedy,
    resolve_replaced,
)
from orchestrator.engine.nvme_checkpoint import mapped_optimizer_state, restore_to_nvme, without_swap_folder
from orchestrator.engine.train_engine import CheckpointIO, TrainEngine
from orchestrator.errors import TrainingError

FP32_NAMES = "fp32_names"  # names of the fp32 weights, which DeepSpeed saves without names under ZeRO-0
_T = TypeVar("_T")


def save(
    engine: TrainEngine, directory: Path, step: int, attempt: int, authorize_publish: Callable[[], None]
) -> Path:
    """Write and publish a checkpoint.

    Args:
        engine: DeepSpeed's engine.
        directory: The checkpoints directory of the run.
        step: Number of completed steps.
        attempt: Number of this attempt; two attempts never write to the same draft.
        authorize_publish: Called on rank 0 right before publishing; raises if a newer attempt has taken over.

    Returns:
        The published checkpoint.

    Raises:
        TrainingError: The checkpoint cannot be written; published checkpoints are unchanged.
        Exception: What `authorize_publish` raised, on rank 0; RuntimeError on the other ranks.
    """
    # Zero-padded, so that names sort by step; the draft is on the same file system, so rename is atomic.
    final = directory / f"step-{step:08d}"
    draft = directory / f"{final.name}.attempt-{attempt}.partial"
    is_rank_zero = dist.get_rank() == 0
    # A step that may fail on one rank ends with a collective: all ranks learn of an error and raise it.
    raise_on_all_ranks = partial(_raise_on_all_ranks, draft=draft, step=step)
    raise_on_all_ranks(_error_of(lambda: _create(draft)) if is_rank_zero else None)
    raise_on_all_ranks(_write_shards(engine, draft, step))
    entries: dict[str, FileEntry] = {}
    raise_on_all_ranks(_error_of(lambda: entries.update(_hash_own_share(draft / SHARDS))))
    # Hashing reads every file again, so it is split over the ranks.
    files = {name: entry for part in _gather(entries) for name, entry in part.items()}
    _require_shared_storage(engine, draft / SHARDS, files, step)

    # As late as possible, so that a newer attempt can hardly begin between this and the rename.
    _authorize_on_rank_zero(authorize_publish, draft)
    manifest: Manifest = {"step": step, **_layout(engine), "files": files}
    raise_on_all_ranks(_error_of(lambda: _publish(draft, final, manifest)) if is_rank_zero else None)
    return final


def load(engine: TrainEngine, checkpoint: Path) -> int:
    """Verify a checkpoint and restore the engine from it.

    Returns:
        The number of completed steps.

    Raises:
        TrainingError: A file is missing or damaged, or world size or ZeRO stage differ.
    """
    step, problems = 0, []
    try:
        manifest = read_manifest(checkpoint)
        step = int(manifest["step"])
        problems = _layout_problems(checkpoint, manifest, engine) or _own_file_problems(
            checkpoint, manifest["files"]
        )
    except TrainingError as error:
        problems = list(error.problems)
    # All ranks read the same manifest, so that several may report the same problem.
    all_problems = list(dict.fromkeys(problem for part in _gather(problems) for problem in part))
    if all_problems:
        raise TrainingError(*all_problems)
    # Frozen weights are not in the checkpoint; they come from the base model.
    is_fully_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    with restore_to_nvme(engine):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=SHARDS, load_module_strict=is_fully_trained)
    if path is None:
        raise TrainingError(f"DeepSpeed found no checkpoint in {checkpoint / SHARDS}; {remedy(checkpoint)}")
    return step


class _DeferringWriter:
    """DeepSpeed's checkpoint writer, except that it records the first error instead of raising it."""

    def __init__(self, writer: CheckpointIO) -> None:
        self._writer = writer
        self.error: str | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._writer, name)

    def attempt(self, action: Callable[[], object]) -> None:
        """Run an action on storage, unless an earlier one failed."""
        if self.error is None:
            self.error = _error_of(action)

    def save(self, state_dict: Mapping[str, object], path: str) -> None:
        """Write a file, or leave no part of it."""
        self.attempt(lambda: self._writer.save(state_dict, path))
        if self.error is not None:
            Path(path).unlink(missing_ok=True)

    def load(self, path: str, map_location: object = None) -> object:
        """Return the content of a file."""
        return self._writer.load(path, map_location)


def _write_shards(engine: TrainEngine, draft: Path, step: int) -> str | None:
    """Let DeepSpeed write the shards of this rank; return the error, if any.

    `save_checkpoint` has barriers between and after the files (deepspeed/runtime/engine.py, 0.19). A rank
    that left it by an exception would enter another collective while the others wait in a barrier, and
    gloo aborts on such a mismatch. So errors are recorded until all ranks have left it.
    """
    writer, copy_script = engine.checkpoint_engine, engine._copy_recovery_script
    # zero_to_fp32.py is copied outside of the checkpoint engine, so it is wrapped separately.
    deferring = _DeferringWriter(writer)
    engine.checkpoint_engine = deferring
    engine._copy_recovery_script = lambda path: deferring.attempt(lambda: copy_script(path))
    try:
        with without_swap_folder(engine), ExitStack() as stack:
            deferring.attempt(lambda: stack.enter_context(mapped_optimizer_state(engine)))
            engine.save_checkpoint(
                str(draft),
                tag=SHARDS,
                client_state={"step": step, FP32_NAMES: _fp32_names(engine)},
                save_latest=False,  # manifests name the complete checkpoints; `latest` is not atomic
                exclude_frozen_parameters=True,
            )
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = writer, copy_script
    return deferring.error


def _fp32_names(engine: TrainEngine) -> list[str]:
    """Return the names of the optimizer's fp32 weights under ZeRO-0, in the order in which they are saved.

    Under ZeRO-1 to 3 DeepSpeed saves the names itself.
    """
    if engine.zero_optimization_stage() > 0:
        return []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    # PyTorch's own optimizer (ZeRO-0 in fp32) has no such groups: the model's weights are fp32 already.
    groups = getattr(engine.optimizer, "fp16_groups", [])
    return [names[id(parameter)] for group in groups for parameter in group]


def _create(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    (draft / SHARDS).mkdir(parents=True)


def _authorize_on_rank_zero(authorize_publish: Callable[[], None], draft: Path) -> None:
    refusal: Exception | None = None
    if dist.get_rank() == 0:
        try:
            authorize_publish()
        except Exception as error:  # of any type: the other ranks must not wait for rank 0
            refusal = error
            shutil.rmtree(draft, ignore_errors=True)
    reason = _gather(error_text(refusal) if refusal is not None else None)[0]
    if refusal is not None:
        raise refusal
    if reason is not None:
        raise RuntimeError(f"rank 0 was not permitted to publish {draft.name}: {reason}")


def _publish(draft: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and rename the draft, each durable before the next: fsync file, then directory."""
    write_json(draft / MANIFEST, manifest, fsync=True)
    _fsync(draft / SHARDS)
    _fsync(draft)
    replaced = final.with_name(f"{final.name}.replaced.partial")
    if replaced.exists():
        resolve_replaced(replaced, final)
    if final.exists():
        # Two renames, because rename cannot replace a directory that is not empty.
        # An earlier attempt published this step and ended before it was recorded, so it was trained again.
        final.rename(replaced)
    draft.rename(final)
    _fsync(final.parent)
    if replaced.exists():
        resolve_replaced(replaced, final)


def _error_of(action: Callable[[], object]) -> str | None:
    """Run an action on storage; return its error, if any. torch reports a full disk as RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return error_text(error)
    return None


def _raise_on_all_ranks(error: str | None, draft: Path, step: int) -> None:
    """Raise on every rank if any rank has an error."""
    errors = {rank: text for rank, text in enumerate(_gather(error)) if text is not None}
    if not errors:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
    reasons = "; ".join(f"rank {rank}: {text}" for rank, text in errors.items())
    raise TrainingError(
        f"the checkpoint of step {step} cannot be written to {draft.parent} ({reasons}); free some space or "
        "repair the storage, then run the job again to resume from the last published checkpoint"
    )


def _gather(value: _T) -> list[_T]:
    """Return the values of all ranks, by rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _layout(engine: TrainEngine) -> Layout:
    return {"world_size": dist.get_world_size(), "zero_stage": int(engine.zero_optimization_stage())}


def _layout_problems(checkpoint: Path, manifest: Mapping[str, object], engine: TrainEngine) -> list[str]:
    return [
        f"{checkpoint} was written with {key}={manifest[key]}, and this run has {key}={value}; run it with "
        "the same layout, or export the checkpoint and start a new run from the exported model"
        for key, value in _layout(engine).items()
        if manifest[key] != value
    ]


def _own_share(names: list[str]) -> list[str]:
    """Return the files that this rank hashes: every world_size-th one, whichever rank wrote it."""
    # Sorted, because directory listings differ between nodes: shares must be disjoint and cover every file.
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _hash_own_share(shards: Path) -> dict[str, FileEntry]:
    """Flush, read back and hash this rank's share of the files."""
    names = _own_share([path.name for path in shards.iterdir()])
    for name in names:
        _fsync(shards / name)
    return {name: file_entry(shards / name) for name in names}


def _own_file_problems(checkpoint: Path, files: Mapping[str, FileEntry]) -> list[str]:
    return file_problems(checkpoint, {name: files[name] for name in _own_share(list(files))})


def _require_shared_storage(
    engine: TrainEngine, shards: Path, files: Mapping[str, FileEntry], step: int
) -> None:
    """Raise on every rank if some rank does not see the files that the others wrote.

    Without shared storage each node would have a part of the checkpoint, and none could resume from it.
    """
    ranks = dist.get_world_size()
    if engine.zero_optimization_stage() == 0:  # rank 0 writes for all
        count, what = sum(_gather(any(shards.glob("*model_states.pt")))), "is seen by"
    else:
        count, what = sum(name.endswith("optim_states.pt") for name in files), "has the optimizer shards of"
    if count != ranks:
        raise TrainingError(
            f"the checkpoint of step {step} {what} {count} ranks, and there are {ranks}: the nodes do not "
            "share the storage; set checkpoint.storage to a directory that all nodes mount"
        )


def _fsync(path: Path) -> None:
    # Directories can only be opened for reading; fsync flushes a file whichever descriptor wrote it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
