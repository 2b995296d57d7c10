"""What is in a checkpoint, how two differ, and its tensors as plain safetensors; needs no engine."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from orchestrator.checkpoint.tensor_parts import dtype_of
from orchestrator.checkpoint.tensor_reader import TensorReader
from orchestrator.errors import SpecError, TrainingError

_MAX_FILE_BYTES = 5 * 10**9
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Section:
    """Tensors whose names begin alike: number, elements and bytes."""

    tensors: int
    elements: int
    bytes: int


def find(path: Path) -> Path:
    """Return a checkpoint: the path itself, or the newest of a run or of its checkpoints directory.

    Raises:
        SpecError: There is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for directory in (path / "checkpoints", path):
        if found := checkpoint_dir.published(directory):
            return found[-1]
    raise SpecError(
        f"{path} is not a checkpoint and has none; name a run directory, STORAGE/NAME, or a folder step-N "
        "in its checkpoints/"
    )


def contents(checkpoint: Path) -> dict[str, Any]:
    """Return who wrote a checkpoint, and the size of its sections, as `checkpoint show --json` prints them.

    Raises:
        TrainingError: The manifest is missing, damaged, or of another format.
    """
    manifest = read_manifest(checkpoint)
    sections: dict[str, Section] = {}
    for name, entry in manifest["tensors"].items():
        section, elements = name.partition(".")[0], math.prod(entry["shape"])
        size = elements * dtype_of(entry["dtype"]).itemsize
        one = sections.get(section, Section(0, 0, 0))
        sections[section] = Section(one.tensors + 1, one.elements + elements, one.bytes + size)
    kept = ("step", "attempt", "written_by", "optimizer", "layout", "engine", "tied")
    return {
        "path": str(checkpoint),
        **{key: value for key, value in manifest.items() if key in kept},
        "files": len(manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "sections": {name: asdict(section) for name, section in sections.items()},
        "tensors": {
            name: {"dtype": entry["dtype"], "shape": entry["shape"]}
            for name, entry in manifest["tensors"].items()
        },
    }


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two checkpoints.

    Attributes:
        name: Its name.
        largest: Largest absolute difference of an element; None if only one has it, or the shapes differ.
        relative: L2 norm of the difference, divided by that of the first.
    """

    name: str
    largest: float | None
    relative: float | None


def differences(one: Path, other: Path) -> Iterator[Difference]:
    """Yield the tensors that are not equal to the bit; reads one tensor of each at a time.

    Raises:
        TrainingError: A file is missing or damaged.
    """
    first, second = read_manifest(one), read_manifest(other)
    reader, against = TensorReader(one, first), TensorReader(other, second)
    for name in dict.fromkeys((*first["tensors"], *second["tensors"])):
        if not _are_comparable(first, second, name):
            yield Difference(name, None, None)
            continue
        before, after = reader.tensor(name).double(), against.tensor(name).double()
        if not torch.equal(before, after):
            change = after - before
            norm = float(before.norm())
            relative = float(change.norm()) / norm if norm else math.inf
            yield Difference(name, float(change.abs().max()), relative)


def _are_comparable(first: Manifest, second: Manifest, name: str) -> bool:
    entries = [manifest["tensors"].get(name) for manifest in (first, second)]
    return all(entries) and len({tuple(entry["shape"]) for entry in entries if entry}) == 1


def convert(checkpoint: Path, to: Path) -> list[Path]:
    """Write the whole tensors of a checkpoint as safetensors, a few files for each section.

    Args:
        checkpoint: The checkpoint.
        to: Folder to create; it must be new or empty.

    Returns:
        The files, SECTION-NNNNN.safetensors.

    Raises:
        SpecError: The folder has content.
        TrainingError: A file is missing or damaged, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SpecError(f"--to {to} is not empty, and nothing is overwritten; name a new folder")
    manifest = read_manifest(checkpoint)
    draft = to.with_name(f".{to.name}.{uuid.uuid4().hex}.partial")
    written = []
    try:
        draft.mkdir(parents=True)
        reader = TensorReader(checkpoint, manifest)
        for number, names in enumerate(_files(manifest)):
            section = names[0].partition(".")[0]
            file = draft / f"{section}-{number:05d}.safetensors"
            save_file({name: reader.tensor(name) for name in names}, file, {"format": "pt"})
            file.chmod(draft.stat().st_mode & 0o666)  # safetensors ignores the umask
            written.append(to / file.name)
        if to.is_dir():
            to.rmdir()
        draft.rename(to)
    except (OSError, SafetensorError) as error:
        raise _cannot_be_written(to, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _files(manifest: Manifest) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file: of one section, and at most 5 GB together."""
    names: list[str] = []
    size = 0
    for name, entry in sorted(manifest["tensors"].items()):
        more = math.prod(entry["shape"]) * dtype_of(entry["dtype"]).itemsize
        is_other = bool(names) and names[0].partition(".")[0] != name.partition(".")[0]
        if names and (is_other or size + more > _MAX_FILE_BYTES):
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def _cannot_be_written(to: Path, error: Exception) -> TrainingError:
    reason = getattr(error, "strerror", None) or str(error)
    return TrainingError(
        f"{to} cannot be written ({reason}), and nothing there was changed; free some space, or name another "
        "folder with --to"
    )


def contents_text(found: dict[str, Any]) -> str:
    """Return `contents` as a table for people."""
    by = found["written_by"]
    versions = ", ".join(
        f"{name} {value}" for name, value in by.items() if name not in ("workers", "zero_stage")
    )
    lines = [
        f"step {found['step']}, attempt {found['attempt']}: {found['path']}",
        f"written with workers={by.get('workers')}, zero_stage={by.get('zero_stage')} by {versions}",
        f"optimizer state: {found['optimizer']}",
        f"{found['files']} files, {found['bytes'] / 2**20:,.1f} MiB",
        f"{'':12}{'tensors':>9}{'elements':>16}{'MiB':>12}",
    ]
    for name, section in found["sections"].items():
        lines.append(
            f"{name:12}{section['tensors']:>9,}{section['elements']:>16,}{section['bytes'] / 2**20:>12,.1f}"
        )
    return "\n".join(lines)


def differences_text(found: list[Difference], total: int) -> str:
    """Return the differences of two checkpoints for people, those that differ most first."""
    if not found:
        return f"all {total:,} tensors are equal to the bit"
    lines = [f"{len(found):,} of {total:,} tensors differ"]
    for each in sorted(found, key=lambda one: -(math.inf if one.relative is None else one.relative))[
        :_MAX_SHOWN
    ]:
        what = "in one only, or of other shapes"
        if each.relative is not None:
            what = f"relative L2 {each.relative:.2e}, largest {each.largest:.2e}"
        lines.append(f"  {each.name}: {what}")
    if len(found) > _MAX_SHOWN:
        lines.append(f"  and {len(found) - _MAX_SHOWN:,} more")
    return "\n".join(lines)
