"""Save and load checkpoints: all ranks write their parts to shared storage, and rank 0 publishes.

All functions are collective: every rank calls them, and an error on one rank is raised on all, so that no
rank waits in a collective for one that is gone.

Saving: create a draft directory -> DCP plans and every rank writes and flushes its file -> write the manifest
-> rename. A crash at any time leaves the published checkpoints as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from orchestrator import __version__
from orchestrator.checkpoint import manifest as manifests
from orchestrator.checkpoint import training_state
from orchestrator.checkpoint.checkpoint_dir import error_text, resolve_replaced, set_aside
from orchestrator.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    TensorEntry,
    TensorFile,
    read_manifest,
)
from orchestrator.checkpoint.tensor_parts import Parts, PartsSavePlanner, TensorPart
from orchestrator.checkpoint.tensor_reader import TensorReader
from orchestrator.checkpoint.tensor_writer import TensorFileWriter
from orchestrator.engine.fragments import refresh_weights
from orchestrator.engine.optimizer_state import state_format
from orchestrator.engine.train_engine import TrainEngine
from orchestrator.errors import TrainingError

_PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_OPTIMIZERS: Mapping[str, str] = {
    "adamw": "adamw",
    "muon": "muon",
    "adamw_8bit": "adamw_8bit or paged_adamw_8bit",
    "paged_adamw": "paged_adamw",
}
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
    raise_on_all_ranks(_require_shared(draft))
    described = _describe(engine, step, attempt)

    def finish(tensors: dict[str, TensorEntry], files: list[TensorFile]) -> None:
        shapes = training_state.shapes(engine)
        for name, tensor in tensors.items():
            tensor["shape"] = training_state.shape_of(shapes, name, tensor["shape"])
        described["tensors"], described["files"] = tensors, files

    with ExitStack() as stack:
        parts: dict[str, TensorPart] = {}
        state = training_state.saved_parts(engine)
        raise_on_all_ranks(_error_of(lambda: parts.update(stack.enter_context(state))))
        writer = TensorFileWriter(draft, finish)
        try:
            dcp_save(dict(parts), storage_writer=writer, planner=PartsSavePlanner())
        except CheckpointException as error:
            raise _cannot_be_written(_reasons(error), draft, step) from error

    # As late as possible, so that a newer attempt can hardly begin between this and the rename.
    _authorize_on_rank_zero(authorize_publish, draft)
    raise_on_all_ranks(_error_of(lambda: _publish(draft, final, described)) if is_rank_zero else None)
    return final


@dataclass(frozen=True)
class Restored:
    """What a rank read from a checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        step: Number of completed steps.
        bytes_read: Bytes read, with the digests that verify them.
        bytes_held: Bytes of this rank's parts.
    """

    checkpoint: Path
    step: int
    bytes_read: int
    bytes_held: int


def load_newest(engine: TrainEngine, checkpoints: Sequence[Path]) -> tuple[Restored, list[str]]:
    """Restore the engine from the newest checkpoint that is whole.

    Args:
        engine: The engine.
        checkpoints: Published checkpoints, oldest first; at least one.

    Returns:
        What was restored, and on rank 0 a line for each problem of a newer checkpoint, which is damaged.

    Raises:
        TrainingError: None is whole, or a whole one is of another model or optimizer.
    """
    damage: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints):
        try:
            restored = load(engine, checkpoint)
        except DamagedCheckpointError as error:
            damage[checkpoint] = [problem.rpartition("; ")[0] for problem in error.problems]
            continue
        # All ranks have read what they need. Only the notes of rank 0 are shown.
        done = {damaged: set_aside(damaged) for damaged in damage} if dist.get_rank() == 0 else {}
        notes = [
            f"{problem}; resuming from step {restored.step} instead, and {aside}"
            for damaged, aside in done.items()
            for problem in damage[damaged]
        ]
        return restored, notes
    folder = checkpoints[0].parent
    raise TrainingError(
        *(f"{problem}; restore it from a copy" for of_one in damage.values() for problem in of_one),
        f"no whole checkpoint is left in {folder}; restore one from a copy, or remove the folder to train "
        "from step 0 again",
    )


def load(engine: TrainEngine, checkpoint: Path) -> Restored:
    """Restore the engine from a checkpoint, whatever number of workers and ZeRO stage wrote it.

    Each rank reads and verifies the parts that it holds.

    Raises:
        DamagedCheckpointError: A file is missing or damaged.
        TrainingError: The checkpoint is of another model or optimizer.
    """
    problems: list[str] = []
    is_damaged = False
    held = 0

    def fill(parts: Parts) -> None:
        nonlocal held
        reader.fill(parts)
        held += sum(part.values.nbytes for part in parts.values())

    try:
        manifest = read_manifest(checkpoint)
        problems = _differences(checkpoint, manifest, engine)
        if not problems:
            reader = TensorReader(checkpoint, manifest)
            training_state.replace_state(engine, manifest["tensors"], fill)
    except TrainingError as error:
        problems, is_damaged = list(error.problems), isinstance(error, DamagedCheckpointError)
    of_ranks = _gather((problems, is_damaged))
    # All ranks read the same manifest, so that several may report the same problem.
    all_problems = list(dict.fromkeys(problem for part, _ in of_ranks for problem in part))
    if all_problems:
        raise (DamagedCheckpointError if any(each for _, each in of_ranks) else TrainingError)(*all_problems)
    refresh_weights(engine)
    training_state.restore_counters(engine, manifest["engine"])
    return Restored(checkpoint, manifest["step"], reader.bytes_read, held)


def _describe(engine: TrainEngine, step: int, attempt: int) -> Manifest:
    """Return the manifest without its tensors and files."""
    return {
        "format": FORMAT,
        "step": step,
        "attempt": attempt,
        "written_by": {
            "orchestrator": __version__,
            **{name: metadata.version(name) for name in _PACKAGES},
            "workers": dist.get_world_size(),
            "zero_stage": int(engine.zero_optimization_stage()),
        },
        "engine": training_state.counters(engine),
        "optimizer": state_format(engine),
        "tied": training_state.tied_names(engine),
        "layout": _layout(engine),
        "files": [],
        "tensors": {},
    }


def _layout(engine: TrainEngine) -> list[int] | None:
    """Return ZeRO stage and workers if the optimizer's state fits only these: blocks are of a partition."""
    if state_format(engine) != "adamw_8bit":
        return None
    stage = int(engine.zero_optimization_stage())
    return [stage, dist.get_world_size() if stage else 0]


def _differences(checkpoint: Path, manifest: Manifest, engine: TrainEngine) -> list[str]:
    """Return an error message for each reason why a checkpoint does not fit the engine."""
    fresh = "or export the checkpoint and start a new run from the exported model"
    used = state_format(engine)
    if manifest["optimizer"] != used:
        saved = _OPTIMIZERS.get(manifest["optimizer"], manifest["optimizer"])
        return [
            f"{checkpoint} has the state of optim.optimizer={saved}, and this run uses "
            f"{_OPTIMIZERS[used]}; use the optimizer that wrote it, {fresh}"
        ]
    layout, saved_layout = _layout(engine), manifest["layout"]
    if layout and saved_layout and layout != saved_layout:
        (stage, workers), (old_stage, old_workers) = layout, saved_layout
        return [
            f"{checkpoint} has 8-bit optimizer state in blocks of the partitions of "
            f"zero_stage={old_stage}{f', workers={old_workers}' if old_workers else ''}, and this run has "
            f"zero_stage={stage}{f', workers={workers}' if workers else ''}; use that layout, {fresh}"
        ]
    shapes = training_state.shapes(engine)
    saved_shapes = {
        name.removeprefix("model."): tuple(entry["shape"])
        for name, entry in manifest["tensors"].items()
        if name.startswith("model.")
    }
    differing = [name for name in {**shapes, **saved_shapes} if shapes.get(name) != saved_shapes.get(name)]
    if differing:
        name = differing[0]
        return [
            f"{checkpoint} has {len(saved_shapes)} weights, this run trains {len(shapes)}, and "
            f"{len(differing)} differ: {name} is {_shape_text(saved_shapes.get(name))} there and "
            f"{_shape_text(shapes.get(name))} here; use the model and method that wrote it, {fresh}"
        ]
    return []


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _create(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def _require_shared(draft: Path) -> str | None:
    """Return an error if this rank does not see the draft of rank 0."""
    if draft.is_dir():
        return None
    return "the nodes do not share the storage; set checkpoint.storage to a directory that all nodes mount"


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
    with (draft / MANIFEST).open("wb") as file:
        file.write(manifests.dumps(manifest))
        file.flush()
        os.fsync(file.fileno())
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
    """Run an action on storage; return its error, if any."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return error_text(error)
    return None


def _raise_on_all_ranks(error: str | None, draft: Path, step: int) -> None:
    """Raise on every rank if any rank has an error."""
    errors = {rank: text for rank, text in enumerate(_gather(error)) if text is not None}
    if errors:
        raise _cannot_be_written(errors, draft, step)


def _reasons(error: CheckpointException) -> dict[int, str]:
    """Return the message of each rank's exception, which DCP gathered."""
    return {rank: error_text(cause) for rank, (cause, _) in error.failures.items()}


def _cannot_be_written(errors: Mapping[int, str], draft: Path, step: int) -> TrainingError:
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
    reasons = "; ".join(f"rank {rank}: {text}" for rank, text in errors.items())
    return TrainingError(
        f"the checkpoint of step {step} cannot be written to {draft.parent} ({reasons}); free some space or "
        "repair the storage, then run the job again to resume from the last published checkpoint"
    )


def _gather(value: _T) -> list[_T]:
    """Return the values of all ranks, by rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _fsync(path: Path) -> None:
    # Directories can only be opened for reading; fsync flushes a file whichever descriptor wrote it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
