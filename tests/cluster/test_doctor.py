"""`orchestrator doctor` on two real Ray nodes, with working and with unusable storage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.beds import new_bed
from tests.conftest import ENVIRONMENT, ROOT
from tests.support.testbed import Testbed

pytestmark = [pytest.mark.cluster, pytest.mark.ray]


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with new_bed(2, 1, PYTHONPATH=str(ROOT)) as bed:
        yield bed


def doctor(bed: Testbed, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Run `doctor` on the head as a driver of the cluster."""
    process = bed.run(
        0,
        [sys.executable, "-m", "orchestrator", "doctor", "--address", bed.gcs_address, *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


def test_doctor_checks_two_nodes_and_runs_an_all_reduce(bed: Testbed, tmp_path: Path) -> None:
    code, out, err = doctor(bed, "--storage", str(tmp_path / "shared"), "--json", cwd=tmp_path)
    assert code == 0, err
    found = json.loads(out)
    assert sorted(node["node"] for node in found["nodes"]) == sorted(bed.addresses)
    for node in found["nodes"]:
        assert node["storage_problem"] is None
        assert node["interface"] not in (None, "lo")
        assert abs(node["skew_seconds"]) <= node["skew_error_seconds"] + 0.05, "both nodes share one clock"
        assert node["versions"]["torch"]
    assert found["all_reduce"]["ranks"] == 2
    assert found["all_reduce"]["backend"] == "gloo"
    assert found["all_reduce"]["bus_gigabytes_per_second"] > 0
    assert list((tmp_path / "shared").iterdir()) == []


def test_unwritable_storage_is_a_problem_of_every_node(bed: Testbed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, out, err = doctor(bed, "--storage", str(tmp_path / "file" / "runs"), cwd=tmp_path)
    assert code == 3
    assert "cluster error: 2 problems" in err
    for address in bed.addresses:
        assert address in err
        assert address in out
    assert "cannot be written (Not a directory)" in err
    assert "all-reduce of 32 MiB over 2 ranks (gloo)" in out
