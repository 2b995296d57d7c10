"""The checkpoints directory of a run: published checkpoints, their manifests, retention and cleanup.

    step-00000020/manifest.json       step, world size, ZeRO stage, and the size and SHA-256 of every shard
    step-00000020/shards/             DeepSpeed's files: one set a rank; under ZeRO-0 of rank 0 only
    step-00000040.attempt-2.partial   being written; never read
    step-00000020.replaced.partial    replaced by a newer checkpoint of the same step, to be removed

A checkpoint is complete if and only if it has a manifest. Files that this program did not write are never
removed, wherever they are. Nothing here is collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

from orchestrator.checks.owned_files import move_others, remove_own
from orchestrator.errors import TrainingError

MANIFEST = "manifest.json"
SHARDS = "shards"
# Eight digits or more: names are zero-padded to eight, and longer from step 100,000,000.
_PUBLISHED = re.compile(r"step-\d{8,}")
_DRAFT = re.compile(r"step-\d{8,}\.(attempt-\d+|old)\.partial")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced\.partial")
_RETIRED = "manifest.retired.json"  # name of the manifest while the files of the checkpoint are removed
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # DeepSpeed writes them next to the shards


class FileEntry(TypedDict):
    """A file in a manifest: size and hash."""

    bytes: int
    sha256: str


class Layout(TypedDict):
    """What must be the same when a checkpoint is loaded: it determines the content of each shard."""

    world_size: int
    zero_stage: int


class Manifest(Layout):
    """Content of manifest.json: `files` maps names in shards/ to their entries."""

    step: int
    files: dict[str, FileEntry]


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


def clean(directory: Path, keep: int) -> None:
    """Remove drafts of earlier attempts, finish interrupted removals, and apply retention.

    Args:
        directory: The checkpoints directory of the run.
        keep: Number of checkpoints to keep.
    """
    # Only names of our own pattern: a user may have a directory *.partial as well.
    for draft in directory.glob("*.partial"):
        if _DRAFT.fullmatch(draft.name):
            shutil.rmtree(draft, ignore_errors=True)
        elif match := _REPLACED.fullmatch(draft.name):
            resolve_replaced(draft, directory / match[1])
    for manifest in directory.glob(f"step-*/{_RETIRED}"):
        _remove(manifest.parent, _RETIRED)
    retain(directory, keep)


def retain(directory: Path, keep: int) -> None:
    """Remove all but the newest checkpoints of a run.

    Args:
        directory: The checkpoints directory of the run.
        keep: Number of checkpoints to keep.
    """
    for checkpoint in published(directory)[:-keep]:
        if not _own_files(checkpoint):  # its manifest is damaged: removing it is up to the user
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
        with suppress(OSError):  # not empty if the user added files
            (checkpoint / SHARDS).rmdir()
        remove_own(checkpoint, {manifest})


def _own_files(checkpoint: Path, manifest: str = MANIFEST) -> set[str]:
    """Return the files of a checkpoint that this program wrote; empty if there is no valid manifest."""
    try:
        files = json.loads((checkpoint / manifest).read_text(encoding="utf-8"))["files"]
        return {manifest, *_SCRIPTS, *(f"{SHARDS}/{name}" for name in files)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


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


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        TrainingError: The manifest is missing or invalid.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        missing = Manifest.__required_keys__ - manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{checkpoint / MANIFEST} cannot be read ({error_text(error)}); {remedy(checkpoint)}"
        ) from None
    if missing:
        raise TrainingError(
            f"{checkpoint / MANIFEST} lacks {', '.join(sorted(missing))}; {remedy(checkpoint)}"
        )
    return cast(Manifest, manifest)


def verify(checkpoint: Path) -> list[str]:
    """Return an error message for each file that is missing or differs from the manifest.

    Raises:
        TrainingError: The manifest is missing or invalid.
    """
    files = read_manifest(checkpoint)["files"]
    return file_problems(checkpoint, files)


def file_problems(checkpoint: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Return an error message for each of these files that is missing or differs from its entry."""
    problems = (_file_problem(checkpoint, name, entry) for name, entry in files.items())
    return [problem for problem in problems if problem]


def _file_problem(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
    path = checkpoint / SHARDS / name
    try:
        # Size and hash: a truncated file and a flipped bit are both found before DeepSpeed reads it.
        actual = file_entry(path)
    except OSError as error:
        return f"{path}, a file of the checkpoint, cannot be read ({error.strerror}); {remedy(checkpoint)}"
    if actual != entry:
        return (
            f"{path} does not match its manifest: it has {actual['bytes']} bytes, and {entry['bytes']} bytes "
            f"with another hash were written; {remedy(checkpoint)}"
        )
    return None


def file_entry(path: Path) -> FileEntry:
    """Return the size and SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    # fstat of the open file: size and hash belong together even if the path is replaced meanwhile.
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def error_text(error: Exception) -> str:
    """Return the message of an exception on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def remedy(checkpoint: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    return f"remove {checkpoint} and run the job again to resume from the previous checkpoint"
