"""End-to-end sweeps: a cell that runs out of memory yields a row, and a killed sweep resumes."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.bench.runner import own_files
from tests.conftest import finish, orchestrator, processes_of, start, step_rows, wait_until

pytestmark = pytest.mark.ray

SWEEP: dict[str, Any] = {
    "name": "s",
    "layout": "llama2-lora",
    "job": {
        "name": "j",
        "model": {"path": "builtin/tiny-llama", "weights": "random", "gradient_checkpointing": "none"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}], "packing": "concat"},
        "parallel": {"device": "cpu", "zero_stage": 1},
    },
    "cells": [
        {"data.max_length": 4096, "optim.micro_batch_size": 8, "optim.global_batch_size": 8},
        {"data.max_length": 256, "optim.micro_batch_size": 1, "optim.global_batch_size": 2},
    ],
    "memory_limit_gib": 3.0,
    "warmup_steps": 2,
    "steps": 6,
    "storage": "results",
}


def test_a_cell_out_of_memory_is_a_row_and_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    results = tmp_path / "results" / "s"
    marker = uuid.uuid4().hex
    process = start("bench", "sweep.yaml", cwd=tmp_path, TEST_MARKER=marker)

    def second_cell() -> Path | None:
        assert process.poll() is None, process.communicate()
        found = list((results / "cells").glob("max_length-256-*"))
        return found[0] if found and step_rows(found[0]) else None

    try:
        cell = wait_until(second_cell, 300, "a step of the second cell done")
    finally:
        process.kill()
        finish(process)
    (first,) = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    assert first["status"] == "out_of_memory"
    assert "ran out of memory" in first["reason"]
    assert first["samples"] == {}
    wait_until(lambda: not processes_of(f"TEST_MARKER={marker}"), 120, "nothing of the killed sweep left")

    (cell / "left_behind").write_text("mine")
    (cell / "evaluations.jsonl").write_text("of an earlier try")
    done = orchestrator("bench", "sweep.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "[1/2] max_length=4096, micro_batch_size=8, global_batch_size=8: out of memory" in done.err
    assert "(as measured before)" in done.err
    assert not (cell / "evaluations.jsonl").exists(), "a cell starts from nothing"
    assert (cell / "left_behind").read_text() == "mine", "and removes nothing that is not its own"
    ours = set(own_files(cell))
    files = {path.relative_to(cell).as_posix() for path in cell.rglob("*") if path.is_file()}
    assert files - ours == {"left_behind"}, "what a cell writes is what the next try removes"
    assert [row["step"] for row in step_rows(cell)] == list(range(1, 9))
    assert not (cell / "export").exists(), "nobody wants the model of a cell"
    assert not list((cell / "checkpoints").glob("step-*")), "nor its checkpoints"

    again, second = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    assert again == first
    assert second["status"] == "ok"
    assert len(second["samples"]["tgs"]) == 6
    assert min(second["samples"]["tgs"]) > 0
    assert 2**26 < second["peaks"]["host_memory_peak_bytes"] < 2**33
    assert second["environment"]["devices"] == ["cpu"]
    table = json.loads(done.out)
    by_batch = {row["Batch size"]: row for row in table["rows"]}
    assert by_batch[8]["4096 memory (GB)"] == "OOM"
    assert by_batch[1]["256 memory (GB)"] == pytest.approx(
        second["peaks"]["memory_reserved_peak_bytes"] / 1e9
    )
    assert {path.name for path in results.glob("*.svg")} == {"step_time_by_phase.svg"}

    shown = orchestrator("report", "results/s", "--json", cwd=tmp_path)
    assert json.loads(shown.out) == table
    compared = orchestrator("report", "--compare", "results/s", str(cell), "--json", cwd=tmp_path)
    assert compared.code == 2, "a sweep and a run have no cell in common"
    same = orchestrator("report", "--compare", str(cell), str(cell), "--json", cwd=tmp_path)
    verdicts = {row["quantity"]: row["verdict"] for row in json.loads(same.out)["rows"]}
    assert verdicts["TGS"] == "within the noise"
