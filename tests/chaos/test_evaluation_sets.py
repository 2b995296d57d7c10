"""A run evaluates held-out rows and several sets by name; packing says what is held out and what overlaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import job_text, orchestrator

pytestmark = pytest.mark.ray


def _write(file: Path, numbers: range) -> None:
    rows = ({"instruction": f"Count to {number}.", "output": f"One to {number}." * 2} for number in numbers)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_run_has_a_loss_for_each_evaluation_set(tmp_path: Path) -> None:
    _write(tmp_path / "rows.jsonl", range(60))
    _write(tmp_path / "again.jsonl", range(50, 70))
    _write(tmp_path / "new.jsonl", range(100, 110))
    changes: dict[str, Any] = {
        "data": {
            "train": [{"path": "rows.jsonl"}, {"path": "again.jsonl", "repeat": 2}],
            "max_length": 256,
            "deduplicate": True,
        },
        "eval": {
            "share": 0.2,
            "data": {"new": {"path": "new.jsonl"}, "seen": [{"path": "rows.jsonl", "sample": 30}]},
            "every_steps": 1,
        },
        "parallel": {"workers": 1, "zero_stage": 1},
        "optim": {"lr": 1e-3, "global_batch_size": 2, "max_steps": 2},
        "metrics": {"port": None},
    }
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", **changes))
    trained = orchestrator("train", "job.yaml", "--json", cwd=tmp_path)
    assert trained.code == 0, trained.err
    packed = orchestrator("pack", "job.yaml", "--json", cwd=tmp_path)
    assert packed.code == 0, packed.err

    report, run = json.loads(trained.out), tmp_path / "runs" / "run"
    packing = json.loads(packed.out)
    assert packing == report["packing"]
    assert (packing["rows_in_files"], packing["rows_duplicate"]) == (80, 10)
    first, second = packing["sources"]
    assert packing["rows_held_out"] == first["rows_held_out"] + second["rows_held_out"] > 0
    assert packing["rows"] == 60 - first["rows_held_out"] + 2 * (10 - second["rows_held_out"])
    held_out, new, seen = packing["evaluation"]
    assert [held_out["name"], new["name"], seen["name"]] == ["held_out", "new", "seen"]
    assert (held_out["rows"], held_out["rows_in_training"]) == (packing["rows_held_out"], 0)
    assert (new["rows"], new["rows_in_training"]) == (10, 0)
    assert seen["rows"] == 30
    assert 0 < seen["rows_in_training"] <= 30
    for done in (trained, packed):
        assert "10 of 20 rows of" in done.err
        assert "again.jsonl equal an earlier row and are left out" in done.err
        assert f"eval.share=0.2 holds out {packing['rows_held_out']} rows of data.train" in done.err
        assert (
            f"{seen['rows_in_training']} of 30 rows of the evaluation set seen are also trained on"
            in done.err
        )

    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    tokens = {each["name"]: each["trained_tokens"] for each in packing["evaluation"]}
    for row in rows:
        losses = row["evaluation_losses"]
        assert losses.keys() == tokens.keys()
        assert len(set(losses.values())) == 3
        total = sum(losses[name] * tokens[name] for name in tokens) / sum(tokens.values())
        assert row["evaluation_loss"] == pytest.approx(total)
    assert report["evaluation_losses"] == rows[-1]["evaluation_losses"]
    assert report["evaluation_loss"] == rows[-1]["evaluation_loss"]
    assert f"step 2: evaluation loss {report['evaluation_loss']:.4f} (held_out " in trained.err
