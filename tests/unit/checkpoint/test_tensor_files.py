"""What ranks write is read by any other ranks; files are safetensors, and nothing in them is unpickled."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.manifest import MANIFEST, read_manifest
from orchestrator.checkpoint.tensor_parts import TensorPart
from orchestrator.checkpoint.tensor_reader import TensorReader
from orchestrator.errors import TrainingError
from tests.support.checkpoints import flip_a_bit, write_checkpoint, write_parts


def cut(tensor: torch.Tensor, ranks: int) -> list[tuple[int, torch.Tensor]]:
    """Cut a tensor as ZeRO-3 does: (start, elements) for each rank; the last ones may have fewer or none."""
    size = -(-tensor.numel() // ranks)
    return [(at, tensor.view(-1)[at : at + size]) for at in range(0, tensor.numel(), size)]


def parts_of(state: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, TensorPart]:
    found = {}
    for name, tensor in state.items():
        pieces = cut(tensor, ranks)
        if rank < len(pieces):
            start, values = pieces[rank]
            found[f"model.{name}"] = TensorPart(values, start, tensor.numel())
    return found


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Tensors of a model with 4 M parameters, and some that are smaller than the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed": (4000, 257), "a": (1031, 1024), "b": (2048, 1023), "norm": (257,), "scale": (2,)}
    found = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return found | {"half": torch.randn(501, 3, generator=generator).bfloat16(), "count": torch.arange(7)}


@pytest.mark.parametrize(("saved", "loaded"), [(1, 4), (4, 1), (4, 3), (3, 5), (2, 2)])
def test_any_ranks_read_what_any_others_wrote(
    saved: int, loaded: int, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = write_parts(tmp_path / "step-00000001", [parts_of(state, rank, saved) for rank in range(saved)])
    manifest = read_manifest(folder)
    assert checkpoint_dir.verify(folder) == []
    for rank in range(loaded):
        wanted = parts_of(state, rank, loaded)
        empty = {
            name: TensorPart(torch.zeros_like(part.values), part.start, part.elements)
            for name, part in wanted.items()
        }
        reader = TensorReader(folder, manifest)
        reader.fill(empty)
        for name, part in wanted.items():
            assert torch.equal(empty[name].values, part.values), name
        held = sum(part.values.nbytes for part in wanted.values())
        assert held <= reader.bytes_read <= 1.1 * held


def test_files_are_safetensors_with_names_and_places(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "step-00000001", [parts_of(state, rank, 2) for rank in range(2)])
    first = load_file(folder / "tensors-00000.safetensors")
    assert torch.equal(first["model.norm[0:129]"], state["norm"][:129])
    assert {"model.count[0:4]", "block_digests"} < set(first)


def test_a_tensor_that_is_not_whole_is_not_published(tmp_path: Path) -> None:
    parts = [{"model.a": TensorPart(torch.ones(3), 0, 8)}, {"model.a": TensorPart(torch.ones(4), 4, 8)}]
    with pytest.raises(ValueError, match=r"model\.a.*tensor-volume: 8 chunks-volume: 7"):
        write_parts(tmp_path / "step-00000001", parts)


def test_each_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 1, {"a": torch.randn(40_000), "b": torch.randn(3)})
    dice = random.Random(7)
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        for _ in range(50):
            damaged = bytearray(content)
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(bytes(damaged))
            try:
                problems = tuple(checkpoint_dir.verify(saved))
            except TrainingError as error:
                problems = error.problems
            assert len(problems) == 1
            assert file.name in problems[0]
            assert f"remove {saved}" in problems[0]
        file.write_bytes(content)
    assert checkpoint_dir.verify(saved) == []


def test_the_damaged_tensor_is_named(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 1, {"a": torch.randn(90_000), "b": torch.randn(90_000)})
    flip_a_bit(saved, "model.b", at=0.9)
    (problem,) = checkpoint_dir.verify(saved)
    assert "(model.b)" in problem


@pytest.mark.parametrize("name", [MANIFEST, "tensors-00000.safetensors"])
def test_a_hostile_pickle_is_not_run(name: str, tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 1, {"a": torch.randn(100)})
    (saved / name).write_bytes(pickle.dumps(_Hostile(tmp_path / "was_here")))
    with pytest.raises(TrainingError, match=name):
        TensorReader(saved, read_manifest(saved)).tensor("model.a")
    assert not (tmp_path / "was_here").exists()


class _Hostile:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self._file,))
