"""Weights of a checkpoint get their names back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.errors import TrainingError
from orchestrator.export.export import fp32_weights


def write(saved: Path, **state: Any) -> None:
    """Write a checkpoint of a bf16 run under ZeRO-0."""
    (saved / checkpoint_dir.SHARDS).mkdir()
    torch.save({"buffer_names": [], **state}, saved / checkpoint_dir.SHARDS / "mp_rank_00_model_states.pt")
    manifest = {"step": 1, "world_size": 2, "zero_stage": 0, "files": {}}
    (saved / checkpoint_dir.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_fp32_weights_of_zero_0_are_told_by_name_and_not_by_their_place(tmp_path: Path) -> None:
    """Muon's weights form separate parameter groups, and a quantized layer also saves its scales."""
    rounded = {name: torch.full((2,), 1.0, dtype=torch.bfloat16) for name in ("a", "b", "c")}
    groups = [[torch.full((2,), 3.0)], [torch.full((2,), 1.5), torch.full((2,), 2.5)]]
    named = {checkpointer.FP32_NAMES: ["c", "a", "b"]}
    module = {**rounded, "b.scales": torch.full((2,), 9.0)}
    write(tmp_path, module=module, optimizer={"fp32_groups": groups}, **named)
    found = {name: weight.contiguous()[0].item() for name, weight in fp32_weights(tmp_path).items()}
    assert found == {"a": 1.5, "b": 2.5, "c": 3.0, "b.scales": 9.0}


def test_fp32_weights_without_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path, module={"a": torch.ones(2)}, optimizer={"fp32_groups": [[torch.ones(2)]]})
    with pytest.raises(TrainingError, match="export it with that version"):
        fp32_weights(tmp_path)
