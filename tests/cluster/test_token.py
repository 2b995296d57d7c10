"""A dashboard with token authentication: jobs need the token, and the error without it says what to set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.beds import new_bed
from tests.conftest import job_text, orchestrator
from tests.support.testbed import Testbed

pytestmark = [pytest.mark.cluster, pytest.mark.ray]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5f" * 32}


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with new_bed(1, 2, **TOKEN) as bed:
        yield bed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "requires a token; set RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "00" * 32}, "rejected the token in RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN"),
    ],
)
def test_a_job_without_a_valid_token_is_rejected(
    given: dict[str, str], words: str, bed: Testbed, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs"))
    done = orchestrator("submit", "job.yaml", "--address", bed.dashboard_url, cwd=tmp_path, **given)
    assert done.code == 3
    assert words in done.err
    assert not (tmp_path / "runs").exists()


def test_with_the_token_doctor_runs_and_the_job_trains(bed: Testbed, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", optim__max_steps=2))
    command = ("submit", "job.yaml", "--address", bed.dashboard_url)
    # Sending an environment variable to the GCS also requires the token.
    done = orchestrator(*command, cwd=tmp_path, timeout=400, HF_HUB_OFFLINE="1", **TOKEN)
    assert done.code == 0, f"{done.out[-4000:]}\n{done.err[-4000:]}"
    assert "environment variables sent: " in done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("submitted run-")
    assert lines[1].startswith(f"follow ray job logs --follow --address {bed.dashboard_url} run-")
    assert "ready" in lines, "the output of doctor comes first"
    assert "planned for 1x2xcpu: fits: " in done.err, "before anything is uploaded"
    assert (tmp_path / "runs" / "run" / "report.json").exists()


def test_a_job_that_does_not_fit_is_rejected_before_anything_is_uploaded(
    bed: Testbed, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", data__max_length=4 * 2**20))
    done = orchestrator("submit", "job.yaml", "--address", bed.dashboard_url, cwd=tmp_path, **TOKEN)
    assert done.code == 3
    assert "on 1x2xcpu does not fit: " in done.err
    assert "it would fit with (1) --set " in done.err
    assert "submitted" not in done.out
