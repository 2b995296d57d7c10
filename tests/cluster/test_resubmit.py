"""A submitted job resumes by name after it was stopped and after its cluster was shut down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.beds import new_bed
from tests.conftest import Observed, job_text, losses, orchestrator, step_rows, wait_until
from tests.support.testbed import Testbed

pytestmark = [pytest.mark.cluster, pytest.mark.ray]


def submitted(bed: Testbed, folder: Path, *more: str) -> str:
    """Submit the job and return its submission ID."""
    command = ("submit", "job.yaml", "--address", bed.dashboard_url, "--no-doctor", *more)
    done = orchestrator(*command, cwd=folder, timeout=400)
    assert done.code == 0, f"{done.out[-4000:]}\n{done.err[-4000:]}"
    return done.out.splitlines()[0].removeprefix("submitted ")


def test_a_job_resumes_after_a_stop_and_on_a_new_cluster(undisturbed_run: Observed, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    run = tmp_path / "runs" / "run"
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", checkpoint__every_steps=2))
    with new_bed(1, 2) as bed:
        first = submitted(bed, tmp_path, "--no-wait")
        wait_until(lambda: len(step_rows(run)) >= 3, 240, "three steps done")
        client = JobSubmissionClient(bed.dashboard_url)
        client.stop_job(first)  # as an operator would
        wait_until(lambda: client.get_job_status(first).is_terminal(), 60, "the job stopped")
        assert client.get_job_status(first) == "STOPPED"
        stopped_at = len(step_rows(run))
        submitted(bed, tmp_path, "--no-wait")
        wait_until(lambda: len(step_rows(run)) >= stopped_at + 3, 240, "three more steps done")
    # The cluster was shut down with everything on it.
    with new_bed(1, 2) as bed:
        submitted(bed, tmp_path)
    report = json.loads((run / "report.json").read_text())
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 3
    assert 0 < attempts[1]["start_step"] < attempts[2]["start_step"]
    assert (attempts[0]["ended"], attempts[1]["start_step"]) == ("stopped", stopped_at)
    assert report["restarts"] == 1, "a stop does not count as a restart, the end of the cluster does"
    assert losses(run) == pytest.approx(losses(undisturbed_run.folder), rel=1e-5)
