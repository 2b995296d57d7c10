"""A published job trains on data with empty outputs, as in Alpaca itself, and the row counts add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, orchestrator

pytestmark = pytest.mark.ray

JOB = ROOT / "launch" / "jobs" / "published" / "xtuner" / "llama2-7b-8k.yaml"
EMPTY = {"en": [4, 9, 10], "zh": [1, 30]}
NOTHING = ("", " \n", None)
ROWS = 40


def _write(file: Path, empty: list[int]) -> None:
    """Write a JSON array of Alpaca rows; rows in `empty`, counted from 1, have no output."""
    rows = [
        {"instruction": f"Count to {number}.", "input": "", "output": f"One to {number}: done." * 3}
        for number in range(1, ROWS + 1)
    ]
    for at, nothing in zip(empty, NOTHING, strict=False):
        rows[at - 1]["output"] = nothing  # type: ignore[assignment]
    file.write_text(json.dumps(rows), encoding="utf-8")


def _add_up(counts: dict[str, Any]) -> bool:
    left_out = counts["rows_malformed"] + counts["rows_empty"]
    return bool(counts["rows_in_files"] == counts["rows"] + left_out)


def test_a_published_job_trains_on_rows_without_an_output(tmp_path: Path) -> None:
    for name, empty in EMPTY.items():
        _write(tmp_path / f"{name}.json", empty)
    changes = [
        "data.train.0.path=en.json", "data.train.1.path=zh.json", "data.max_length=512",
        "model.path=builtin/tiny-llama", "model.weights=random", "model.dtype=fp32",
        "parallel.device=cpu", "parallel.workers=1", "optim.global_batch_size=1", "optim.max_steps=2",
        "metrics.port=null", f"checkpoint.storage={tmp_path / 'runs'}",
    ]  # fmt: skip
    job = [str(JOB), *(text for change in changes for text in ("--set", change)), "--json"]

    trained = orchestrator("train", *job, cwd=tmp_path)
    assert trained.code == 0, trained.err
    packed = orchestrator("pack", *job, cwd=tmp_path)  # from the token cache of the run
    assert packed.code == 0, packed.err

    run = tmp_path / "runs" / "xtuner-llama2-7b-8k"
    assert not (run / ".validate_storage_marker").exists()
    packing = json.loads(trained.out)["packing"]
    assert packing == json.loads(packed.out)
    assert packing == json.loads((run / "report.json").read_text())["packing"]
    assert (packing["rows_in_files"], packing["rows"], packing["rows_empty"]) == (2 * ROWS, 2 * ROWS - 5, 5)
    assert [source["rows_empty"] for source in packing["sources"]] == [3, 2]
    assert all(map(_add_up, (packing, *packing["sources"])))
    assert packing["tokens_read"] == packing["tokens_kept"] > 0
    for done in (trained, packed):
        for name, empty in EMPTY.items():
            for row, nothing in zip(empty, NOTHING, strict=False):
                reason = "null" if nothing is None else "empty"
                assert f"{name}.json, row {row}: field output is {reason}" in done.err
