"""Checkpoints that tests write without an engine, and damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from orchestrator.checkpoint import manifest as manifests
from orchestrator.checkpoint.manifest import MANIFEST, MODEL, Manifest, TensorEntry, TensorFile
from orchestrator.checkpoint.tensor_parts import Parts, PartsSavePlanner, TensorPart, dtype_of
from orchestrator.checkpoint.tensor_writer import TensorFileWriter


def write_checkpoint(folder: Path, step: int, state: Mapping[str, torch.Tensor]) -> Path:
    """Write and publish a checkpoint of one rank.

    Args:
        folder: The checkpoints directory.
        step: Number of completed steps.
        state: Trained weights by name; those that are tied share their memory.
    """
    first = {tensor.data_ptr(): name for name, tensor in reversed(list(state.items()))}
    tied = {name: first[tensor.data_ptr()] for name, tensor in state.items()}
    parts = {
        f"{MODEL}.{name}": TensorPart(tensor.detach().reshape(-1), 0, tensor.numel())
        for name, tensor in state.items()
        if tied[name] == name
    }
    return write_parts(
        folder / f"step-{step:08d}",
        [parts],
        {f"{MODEL}.{name}": tensor.shape for name, tensor in state.items()},
        {name: other for name, other in tied.items() if name != other},
    )


def write_parts(
    checkpoint: Path,
    parts_of_ranks: Sequence[Parts],
    shapes: Mapping[str, Sequence[int]] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Path:
    """Write and publish a checkpoint of several ranks, one after another in this process.

    Args:
        checkpoint: Its folder, which does not exist.
        parts_of_ranks: The parts of each rank.
        shapes: Shapes of the tensors by name; flat ones without it.
        tied: Name under which a tied weight is saved, by its other names.

    Raises:
        ValueError: The parts do not make up whole tensors.
    """
    checkpoint.mkdir(parents=True)
    manifest: Manifest = {
        "format": manifests.FORMAT,
        "step": int(checkpoint.name.removeprefix("step-")),
        "attempt": 1,
        "written_by": {},
        "engine": {},
        "optimizer": "adamw",
        "tied": dict(tied or {}),
        "layout": None,
        "files": [],
        "tensors": {},
    }

    def publish(tensors: dict[str, TensorEntry], files: list[TensorFile]) -> None:
        for name, entry in tensors.items():
            entry["shape"] = list((shapes or {}).get(name, entry["shape"]))
        manifest["tensors"], manifest["files"] = tensors, files
        (checkpoint / MANIFEST).write_bytes(manifests.dumps(manifest))

    # What DCP's `save` does with a process group.
    ranks = [(TensorFileWriter(checkpoint, publish), PartsSavePlanner()) for _ in parts_of_ranks]
    plans = []
    for number, ((_, planner), parts) in enumerate(zip(ranks, parts_of_ranks, strict=True)):
        planner.set_up_planner(dict(parts), is_coordinator=number == 0)
        plans.append(planner.create_local_plan())
    writer, planner = ranks[0]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for (writer, planner), plan in zip(ranks, plans, strict=True)
    ]
    ranks[0][0].finish(metadata, results)
    return checkpoint


def flip_a_bit(saved: Path, tensor: str, at: float = 0.5) -> Path:
    """Flip a bit of a tensor's first chunk, and return the file.

    Args:
        saved: A checkpoint.
        tensor: Name of the tensor in the manifest.
        at: Where in the chunk, from 0 to 1.
    """
    manifest = manifests.read_manifest(saved)
    _, elements, number, start = manifest["tensors"][tensor]["chunks"][0]
    file = saved / manifest["files"][number]["name"]
    content = bytearray(file.read_bytes())
    size = elements * dtype_of(manifest["tensors"][tensor]["dtype"]).itemsize
    content[start + int(size * at)] ^= 1
    file.write_bytes(content)
    return file
