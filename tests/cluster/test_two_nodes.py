"""A job submitted to two real Ray nodes with one worker each has the same losses as on one node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.beds import new_bed
from tests.conftest import Observed, job_text, losses, orchestrator

pytestmark = [pytest.mark.cluster, pytest.mark.ray]


def test_a_submitted_run_on_two_nodes_equals_the_run_on_one(
    undisturbed_run: Observed, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs"))
    with new_bed(2, 1) as bed:
        done = orchestrator("submit", "job.yaml", "--address", bed.dashboard_url, cwd=tmp_path, timeout=400)
        assert done.code == 0, f"{done.out[-4000:]}\n{done.err[-4000:]}"
        run = tmp_path / "runs" / "run"
        report = json.loads((run / "report.json").read_text())
        assert report["nodes"] == sorted(bed.addresses)
        workers = json.loads((run / "workers.json").read_text())
        assert [worker["rank"] for worker in workers] == [0, 1]
        assert sorted(worker["node"] for worker in workers) == sorted(bed.addresses)
    assert losses(run) == pytest.approx(losses(undisturbed_run.folder), rel=1e-5)
    assert "step 12/12" in done.out
    assert (run / "export" / "model.safetensors").exists()
