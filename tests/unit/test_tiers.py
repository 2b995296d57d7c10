"""What decides about the tiers of tests, and the guard of the fast one."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import ROOT
from tests.support import tiers


@pytest.mark.parametrize("name", [*tiers.GROUPS, *tiers.APART, *tiers.LONGEST_FIRST])
def test_files_of_tiers_exist(name: str) -> None:
    assert name in tiers.GROUPS.values() or (ROOT / "tests" / name).is_file()


@pytest.mark.process
def test_the_guard_notices_a_process_and_allows_questions_about_the_machine() -> None:
    guard = tiers.Guard()
    subprocess.run(["true"], check=True)
    assert guard.started == []
    guard.is_on = True
    subprocess.run(["uname"], check=True, capture_output=True)
    subprocess.run(["true"], check=True)
    guard.is_on = False
    assert guard.started == ["true ['true']"]


def test_fast_tests_have_no_marker_of_another_tier(request: pytest.FixtureRequest) -> None:
    fast = [item for item in request.session.items if item.get_closest_marker("process") is None]
    assert request.node in fast
    found = {mark.name for item in fast for mark in item.iter_markers()}
    assert not found & tiers.IMPLY_PROCESS
