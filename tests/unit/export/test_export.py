"""Weights of a checkpoint are read by name."""

import json
from pathlib import Path

import pytest
import torch

from orchestrator.errors import TrainingError
from orchestrator.export.export import fp32_weights
from tests.support.checkpoints import flip_a_bit, write_checkpoint


def test_weights_are_those_that_were_saved_and_tied_ones_are_one_object(tmp_path: Path) -> None:
    embedding = torch.randn(7, 5)
    state = {"embed": embedding, "layer": torch.randn(3, 2, dtype=torch.bfloat16), "head": embedding}
    weights = fp32_weights(write_checkpoint(tmp_path, 3, state))
    assert set(weights) == set(state)
    assert weights["head"] is weights["embed"]
    for name, weight in weights.items():
        assert (weight.dtype, weight.shape) == (state[name].dtype, state[name].shape)
        assert torch.equal(weight.contiguous(), state[name])


def test_damage_is_found_when_a_weight_is_read(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 3, {"a": torch.randn(50_000), "b": torch.randn(50_000)})
    file = flip_a_bit(saved, "model.b", at=0.9)
    weights = fp32_weights(saved)
    with pytest.raises(TrainingError, match=rf"{file.name} is damaged: bytes .*\(model\.b\); remove"):
        weights["b"].contiguous()
    assert weights["a"].contiguous().shape == (50_000,)


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    manifest = {"step": 1, "world_size": 2, "zero_stage": 0, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(TrainingError, match="format 1, DeepSpeed's files of each rank, which an earlier"):
        fp32_weights(tmp_path)
