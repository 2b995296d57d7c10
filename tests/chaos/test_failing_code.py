"""An exception that occurs twice at the same step is not retried, and its traceback is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, job_text, orchestrator

pytestmark = pytest.mark.ray


def test_code_that_fails_twice_at_one_step_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        job_text(tmp_path / "runs", optim__max_steps=4, checkpoint__every_steps=1, eval=None)
    )
    done = orchestrator(
        "train",
        "job.yaml",
        "--json",
        cwd=tmp_path,
        PYTHONPATH=f"{ROOT / 'tests' / 'chaos' / 'faults'}:{ROOT}",
        FAULT_STEP="2",
        FAULT_RANK="1",
        HF_TOKEN="hf_of_the_test",
    )
    logs = tmp_path / "runs" / "run" / "logs"
    assert done.code == 4
    assert done.out == ""
    assert "rank 1 failed twice in the same way in step 3 (TypeError: unsupported operand at" in done.err
    assert f"the full traceback is in {logs / 'rank-1.attempt-2.log'}" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("    TypeError: unsupported operand")
    rows = [json.loads(line) for line in (logs.parent / "attempts.jsonl").read_text().splitlines()]
    assert [row["attempt"] for row in rows] == [1, 2]
    names = [f"rank-{rank}.attempt-{attempt}.log" for rank in (0, 1) for attempt in (1, 2)]
    assert sorted(path.name for path in logs.iterdir()) == ["driver.log", *names]
    whole = (logs / "rank-1.attempt-2.log").read_text()
    assert "Traceback (most recent call last)" in whole
    assert "in run_worker" in whole
    assert "failed twice in the same way" in (logs / "driver.log").read_text()
    assert not any("hf_of_the_test" in path.read_text() for path in logs.iterdir())
