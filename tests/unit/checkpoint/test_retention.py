"""Retention keeps the newest, the best and every K-th checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.retention import Retention, retention_of
from orchestrator.config.schema import CheckpointSpec
from tests.support.checkpoints import write_checkpoint

STEPS = [10, 20, 30, 40, 50, 60]
LOSSES = {10: 3.0, 20: 1.5, 30: float("nan"), 40: 1.5, 50: 2.0}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(1), {60}),
        (Retention(9), set(STEPS)),
        (Retention(2, every_steps=30), {30, 50, 60}),
        (Retention(1, best=1, losses=LOSSES), {20, 60}),
        (Retention(1, best=3, losses=LOSSES), {20, 40, 50, 60}),
        (Retention(1, best=9, losses=LOSSES), {10, 20, 40, 50, 60}),
        (Retention(1, every_steps=20, best=1, losses={}), {20, 40, 60}),
    ],
)
def test_kept_steps(retention: Retention, kept: set[int]) -> None:
    assert retention.kept(STEPS) == kept


def test_losses_are_those_of_the_run_and_the_last_of_a_repeated_step(tmp_path: Path) -> None:
    rows = [(10, 1.0), (20, 5.0), (20, 2.0), (30, 3.0)]
    lines = [json.dumps({"step": step, "evaluation_loss": loss}) for step, loss in rows]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "eval')
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path / "checkpoints", step, {"a": torch.ones(2)})
    retention = retention_of(CheckpointSpec(keep=1, keep_best=2), tmp_path)
    assert retention.losses == {10: 1.0, 20: 2.0, 30: 3.0}
    checkpoint_dir.retain(tmp_path / "checkpoints", retention)
    left = [checkpoint_dir.step_of(path) for path in checkpoint_dir.published(tmp_path / "checkpoints")]
    assert left == [10, 20, 40]
