"""Grafana's TypeScript types accept the dashboards and reject injected errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitoring.test_dashboards import DASHBOARDS

pytestmark = pytest.mark.process

_PACKAGES = ("@grafana/schema@11.6.0", "typescript@5.8.3")
_TSC = ("--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with Grafana's schema and the TypeScript compiler."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing: apt-get install npm")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        pytest.skip(f"npm cannot install {' '.join(_PACKAGES)}: {done.stderr.strip()[-300:]}")
    return folder


def compiler_errors(packages: Path, dashboard: dict[str, Any]) -> str:
    """Return the compiler errors of a dashboard declared as Grafana's type."""
    file = packages / "dashboard.ts"
    file.write_text(
        "import type { Dashboard } from '@grafana/schema';\nexport const dashboard: Dashboard = "
        f"{json.dumps(dashboard)};\n"
    )
    compiler = packages / "node_modules" / ".bin" / "tsc"
    command = [str(compiler), *_TSC, "--target", "es2022", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=packages, timeout=240)
    assert (done.returncode == 0) == (not done.stdout), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_types_accept_a_dashboard(packages: Path, name: str) -> None:
    assert compiler_errors(packages, DASHBOARDS[name]) == ""


def _unknown_field(dashboard: dict[str, Any]) -> None:
    dashboard["refreshh"] = "30s"


def _no_height(dashboard: dict[str, Any]) -> None:
    del dashboard["panels"][1]["gridPos"]["h"]


def _number_as_title(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][1]["title"] = 5


@pytest.mark.parametrize(
    ("inject", "expected"),
    [
        (_unknown_field, "refreshh"),
        (_no_height, "'h' is missing"),
        (_number_as_title, "'number' is not assignable to type 'string'"),
    ],
)
def test_injected_errors_are_rejected(
    packages: Path, inject: Callable[[dict[str, Any]], None], expected: str
) -> None:
    dashboard = json.loads(json.dumps(DASHBOARDS["orchestrator-runs.json"]))
    inject(dashboard)
    assert expected in compiler_errors(packages, dashboard)
