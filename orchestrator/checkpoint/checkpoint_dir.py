"""The checkpoints directory of a run: published checkpoints, their manifests, retention and cleanup.

    step-00000020/manifest.json                step, tensors, files and digests (`manifest`)
    step-00000020/tensors-00000.safetensors    parts of tensors, a file for each rank (`tensor_writer`)
    step-00000040.attempt-2.partial            being written; never read
    step-00000040.damaged                      could not be read, kept for the user
    step-00000020.replaced.partial             replaced by a newer one of the same step, to be removed

A checkpoint is complete if and only if it has a manifest. Files that this program did not write are never
removed, wherever they are. Nothing here is collective.
"""

from __future__ import annotations

import itertools
import re
import shutil
from contextlib import suppress
from pathlib import Path

from orchestrator.checkpoint.manifest import MANIFEST, loads, read_manifest
from orchestrator.checkpoint.retention import Retention
from orchestrator.checks.owned_files import move_others, remove_own

# Eight digits or more: names are zero-padded to eight, and longer from step 100,000,000.
_PUBLISHED = re.compile(r"step-\d{8,}")
_DRAFT = re.compile(r"step-\d{8,}\.(attempt-\d+|old)\.partial")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced\.partial")
_RETIRED = "manifest.retired.json"  # name of the manifest while the files of the checkpoint are removed


def published(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first.

    Args:
        directory: The checkpoints directory of the run; it may not exist.
    """
    # The manifest is written last and renamed with its directory, so whatever has one is complete.
    manifests = directory.glob("step-*/" + MANIFEST) if directory.is_dir() else []
    return sorted((path.parent for path in manifests if _PUBLISHED.fullmatch(path.parent.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of completed steps of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def clean(directory: Path, retention: Retention) -> None:
    """Remove drafts of earlier attempts, finish interrupted removals, and apply retention.

    Args:
        directory: The checkpoints directory of the run.
        retention: What to keep.
    """
    # Only names of our own pattern: a user may have a directory *.partial as well.
    for draft in directory.glob("*.partial"):
        if _DRAFT.fullmatch(draft.name):
            shutil.rmtree(draft, ignore_errors=True)
        elif match := _REPLACED.fullmatch(draft.name):
            resolve_replaced(draft, directory / match[1])
    for manifest in directory.glob(f"step-*/{_RETIRED}"):
        _remove(manifest.parent, _RETIRED)
    retain(directory, retention)


def retain(directory: Path, retention: Retention) -> None:
    """Remove the checkpoints of a run that are not to be kept.

    Args:
        directory: The checkpoints directory of the run.
        retention: What to keep.
    """
    checkpoints = published(directory)
    kept = retention.kept([step_of(checkpoint) for checkpoint in checkpoints])
    for checkpoint in checkpoints:
        # If its manifest is damaged, removing it is up to the user.
        if step_of(checkpoint) in kept or not _own_files(checkpoint):
            continue
        # Removal takes time and may be interrupted. Without its manifest a checkpoint is not complete.
        with suppress(OSError):
            (checkpoint / MANIFEST).rename(checkpoint / _RETIRED)
            _remove(checkpoint, _RETIRED)


def _remove(checkpoint: Path, manifest: str) -> None:
    """Remove the files of a checkpoint, its manifest last: it names the others if this is interrupted."""
    names = _own_files(checkpoint, manifest)
    if names:
        remove_own(checkpoint, names - {manifest})
        remove_own(checkpoint, {manifest})


def _own_files(checkpoint: Path, manifest: str = MANIFEST) -> set[str]:
    """Return the files of a checkpoint that this program wrote; empty if there is no valid manifest."""
    try:
        files = loads((checkpoint / manifest).read_bytes())["files"]
        return {manifest, *(file["name"] for file in files)}
    except (OSError, ValueError):
        return set()


def set_aside(checkpoint: Path) -> str:
    """Rename a damaged checkpoint, so that it counts no more as one that is kept; return what was done."""
    names = (
        f"{checkpoint.name}.damaged{f'-{number}' if number > 1 else ''}" for number in itertools.count(1)
    )
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    try:
        checkpoint.rename(aside)
    except OSError as error:
        return f"it cannot be renamed ({error.strerror}), and counts as one of those that are kept"
    return f"it is renamed to {aside.name}"


def resolve_replaced(replaced: Path, final: Path) -> None:
    """Finish a replacement: remove the old checkpoint, or restore it if the new one was not published.

    Args:
        replaced: The old checkpoint, `final` with the suffix .replaced.partial.
        final: Path of the published checkpoint.
    """
    # A crash came between the two renames of `checkpointer._publish`: the old checkpoint is still valid.
    if not final.exists():
        replaced.rename(final)
        return
    names = _own_files(replaced)
    # Files of the user in the old checkpoint move to the new one.
    move_others(replaced, names, final)
    remove_own(replaced, names)


def verify(checkpoint: Path) -> list[str]:
    """Return an error message for each file that is missing or damaged.

    Raises:
        DamagedCheckpointError: The manifest is missing, damaged, or of another format.
    """
    from orchestrator.checkpoint.tensor_reader import TensorReader  # imports torch

    return TensorReader(checkpoint, read_manifest(checkpoint)).problems()


def error_text(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
