"""Checkpoints on storage that every node shares: written by all ranks, published by one rename.

    checkpoints/step-00000020/manifest.json      step, world size, and the size and SHA-256 of every shard
    checkpoints/step-00000020/shards/            DeepSpeed's files: one set a rank, of rank 0 alone for ZeRO-0
    checkpoints/step-00000040.attempt-2.partial  not published yet; never read

All functions that take an engine are collective: every rank calls them, and what fails on one rank fails on
all, so that nobody is left waiting for a rank that is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import distributed as dist

from orchestrator.checks.owned_files import move_others, remove_own
from orchestrator.engine.nvme_checkpoint import mapped_optimizer_state, restore_to_nvme, without_swap_folder
from orchestrator.errors import TrainingError

MANIFEST = "manifest.json"
SHARDS = "shards"
FP32_NAMES = "fp32_names"  # of the fp32 weights that DeepSpeed saves without names under ZeRO-0
_PUBLISHED = re.compile(r"step-\d{8,}")
_DRAFT = re.compile(r"step-\d{8,}\.(attempt-\d+|old)\.partial")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced\.partial")
_RETIRED = "manifest.retired.json"  # what the manifest is called while its files are removed
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # DeepSpeed puts them beside the shards


def published(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = folder.glob("step-*/" + MANIFEST) if folder.is_dir() else []
    return sorted((path.parent for path in found if _PUBLISHED.fullmatch(path.parent.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint holds."""
    return int(checkpoint.name.removeprefix("step-"))


def clean(folder: Path, keep: int) -> None:
    """Remove what earlier attempts left unpublished, and all but the newest checkpoints.

    What somebody else put into the folder or into a checkpoint stays where it is.
    """
    for draft in folder.glob("*.partial"):
        if _DRAFT.fullmatch(draft.name):
            shutil.rmtree(draft, ignore_errors=True)
        elif match := _REPLACED.fullmatch(draft.name):
            _settle(draft, folder / match[1])
    for half_removed in folder.glob(f"step-*/{_RETIRED}"):
        _remove(half_removed.parent, _RETIRED)
    retain(folder, keep)


def retain(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints of a run.

    Args:
        folder: The run's folder of checkpoints.
        keep: How many stay.
    """
    for old in published(folder)[:-keep]:
        if not _own_files(old):  # whoever damaged its manifest decides what becomes of it
            continue
        # Removal takes time and may be interrupted; half a checkpoint must not look like one.
        with suppress(OSError):
            (old / MANIFEST).rename(old / _RETIRED)
            _remove(old, _RETIRED)


def _remove(checkpoint: Path, manifest: str) -> None:
    """Remove the files of a checkpoint, its manifest last."""
    names = _own_files(checkpoint, manifest)
    if names:
        remove_own(checkpoint, names - {manifest})
        with suppress(OSError):  # it holds what is not ours; empty from the start where no file is listed
            (checkpoint / SHARDS).rmdir()
        remove_own(checkpoint, {manifest})


def _own_files(checkpoint: Path, manifest: str = MANIFEST) -> set[str]:
    """Return the files that make up a checkpoint, none where there is no manifest to tell them."""
    try:
        files = json.loads((checkpoint / manifest).read_text(encoding="utf-8"))["files"]
        return {manifest, *_SCRIPTS, *(f"{SHARDS}/{name}" for name in files)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _settle(replaced: Path, final: Path) -> None:
    """Remove a checkpoint that another of its step has taken the place of; bring it back where none has."""
    if not final.exists():
        replaced.rename(final)
        return
    names = _own_files(replaced)
    move_others(replaced, names, final)
    remove_own(replaced, names)


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
        Exception: On rank 0 what `permit` raised; RuntimeError on the others then.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f"{final.name}.attempt-{attempt}.partial"
    speaks = dist.get_rank() == 0
    _agree(_failure(lambda: _begin(draft)) if speaks else None, draft, step)
    _agree(_write_shards(engine, draft, step), draft, step)
    entries: dict[str, Any] = {}
    _agree(_failure(lambda: entries.update(_describe_my_share(draft / SHARDS))), draft, step)
    files = {name: entry for part in _gather(entries) for name, entry in part.items()}
    _require_one_storage(engine, draft / SHARDS, files, step)
    _permit_on_rank_0(permit, draft)
    manifest = {"step": step, **_layout(engine), "files": files}
    _agree(_failure(lambda: _publish(draft, final, manifest)) if speaks else None, draft, step)
    return final


def load(engine: Any, checkpoint: Path) -> int:
    """Verify a checkpoint and restore the engine from it.

    Returns:
        The steps that are done.

    Raises:
        TrainingError: A file is missing or not what was written, or the checkpoint belongs to another layout.
    """
    step, problems = 0, []
    try:
        manifest = read_manifest(checkpoint)
        step = int(manifest["step"])
        problems = _foreign_layout(checkpoint, manifest, engine) or _verify_my_share(
            checkpoint, manifest["files"]
        )
    except TrainingError as error:
        problems = list(error.problems)
    found = list(dict.fromkeys(problem for part in _gather(problems) for problem in part))
    if found:
        raise TrainingError(*found)
    # Frozen weights are not saved; they come from the base model.
    all_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    with restore_to_nvme(engine):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=SHARDS, load_module_strict=all_trained)
    if path is None:
        raise TrainingError(f"DeepSpeed finds no checkpoint in {checkpoint / SHARDS}; {_remedy(checkpoint)}")
    return step


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises:
        TrainingError: The manifest cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        missing = {"step", "world_size", "zero_stage", "files"} - manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{checkpoint / MANIFEST} cannot be read ({_reason(error)}); {_remedy(checkpoint)}"
        ) from None
    if missing:
        raise TrainingError(
            f"{checkpoint / MANIFEST} lacks {', '.join(sorted(missing))}; {_remedy(checkpoint)}"
        )
    return manifest


def verify(checkpoint: Path) -> list[str]:
    """Return a sentence for each file that is missing or not what was written; in one process."""
    files = read_manifest(checkpoint)["files"]
    return [problem for name, entry in files.items() if (problem := _problem(checkpoint, name, entry))]


class _PatientWriter:
    """DeepSpeed's writer of files, which notes the first error instead of raising it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.failure: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something on storage, unless something has failed before."""
        if self.failure is None:
            self.failure = _failure(action)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, whole or not at all."""
        self.attempt(lambda: self._writer.save(state_dict, path))
        if self.failure is not None:
            Path(path).unlink(missing_ok=True)


def _write_shards(engine: Any, draft: Path, step: int) -> str | None:
    """Let DeepSpeed write the files of this rank; return what went wrong.

    `save_checkpoint` has barriers between and after what it writes (deepspeed/runtime/engine.py, 0.19). A
    rank that left it with an error would meet the others' barrier with another collective: gloo aborts then.
    """
    writer, copy_script = engine.checkpoint_engine, engine._copy_recovery_script
    patient = _PatientWriter(writer)
    engine.checkpoint_engine = patient
    engine._copy_recovery_script = lambda folder: patient.attempt(lambda: copy_script(folder))
    try:
        with without_swap_folder(engine), ExitStack() as stack:
            patient.attempt(lambda: stack.enter_context(mapped_optimizer_state(engine)))
            engine.save_checkpoint(
                str(draft),
                tag=SHARDS,
                client_state={"step": step, FP32_NAMES: _fp32_names(engine)},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = writer, copy_script
    return patient.failure


def _fp32_names(engine: Any) -> list[str]:
    """Return the names of the fp32 weights that an optimizer without partitions keeps, in their order."""
    if engine.zero_optimization_stage() > 0:
        return []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", [])  # PyTorch's own optimizer has none
    return [names[id(parameter)] for group in groups for parameter in group]


def _begin(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    (draft / SHARDS).mkdir(parents=True)


def _permit_on_rank_0(permit: Callable[[], None], draft: Path) -> None:
    refusal: Exception | None = None
    if dist.get_rank() == 0:
        try:
            permit()
        except Exception as error:  # whatever it is, the other ranks have to learn of it
            refusal = error
            shutil.rmtree(draft, ignore_errors=True)
    told = _gather(_reason(refusal) if refusal is not None else None)[0]
    if refusal is not None:
        raise refusal
    if told is not None:
        raise RuntimeError(f"rank 0 was not permitted to publish {draft.name}: {told}")


def _publish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    _write_manifest(draft, manifest)
    _sync(draft / SHARDS)
    _sync(draft)
    replaced = final.with_name(f"{final.name}.replaced.partial")
    if replaced.exists():
        _settle(replaced, final)
    if final.exists():  # the same step, published by an attempt that ended before it could say so
        final.rename(replaced)
    draft.rename(final)
    _sync(final.parent)
    if replaced.exists():
        _settle(replaced, final)


def _failure(action: Callable[[], object]) -> str | None:
    """Return why an action on storage failed, or None; torch reports a full disk as RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _agree(failure: str | None, draft: Path, step: int) -> None:
    """Raise on every rank what failed on any."""
    failures = {rank: reason for rank, reason in enumerate(_gather(failure)) if reason is not None}
    if not failures:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
    reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in failures.items())
    raise TrainingError(
        f"the checkpoint of step {step} cannot be written to {draft.parent} ({reasons}); make room or repair "
        "the storage, and run the job again: it goes on from the last published checkpoint"
    )


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _layout(engine: Any) -> dict[str, int]:
    return {"world_size": dist.get_world_size(), "zero_stage": int(engine.zero_optimization_stage())}


def _foreign_layout(checkpoint: Path, manifest: dict[str, Any], engine: Any) -> list[str]:
    return [
        f"{checkpoint} was written with {key}={manifest[key]}, and this run has {key}={value}; run it with "
        "the same layout, or export the checkpoint and train on from the exported model"
        for key, value in _layout(engine).items()
        if manifest[key] != value
    ]


def _remedy(checkpoint: Path) -> str:
    return f"remove {checkpoint} and run the job again: it goes on from the one before"


def _describe_my_share(shards: Path) -> dict[str, Any]:
    """Flush, read back and hash this rank's share of the files, whoever wrote them."""
    names = sorted(path.name for path in shards.iterdir())[dist.get_rank() :: dist.get_world_size()]
    for name in names:
        _sync(shards / name)
    return {name: _describe(shards / name) for name in names}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _require_one_storage(engine: Any, shards: Path, files: dict[str, Any], step: int) -> None:
    """Raise on every rank where one does not see the files that the others wrote."""
    ranks = dist.get_world_size()
    if engine.zero_optimization_stage() == 0:  # rank 0 writes for all
        seen, what = sum(_gather(any(shards.glob("*model_states.pt")))), "is seen by"
    else:
        seen, what = sum(name.endswith("optim_states.pt") for name in files), "has the optimizer shards of"
    if seen != ranks:
        raise TrainingError(
            f"the checkpoint of step {step} {what} {seen} ranks, and there are {ranks}: the nodes do not "
            "write to one storage; set checkpoint.storage to a folder that all nodes mount"
        )


def _write_manifest(draft: Path, manifest: dict[str, Any]) -> None:
    with (draft / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
        return f"{path} cannot be read ({error.strerror}), and the checkpoint needs it; {_remedy(checkpoint)}"
    if found != entry:
        return (
            f"{path} is not what was written: it has {found['bytes']} bytes, and {entry['bytes']} with "
            f"another hash were; {_remedy(checkpoint)}"
        )
    return None
