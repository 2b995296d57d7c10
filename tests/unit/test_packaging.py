"""Three packages have generic names: from any other directory, Python must find those of this checkout."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "orchestrator-llm-trainer"
PACKAGES = ("orchestrator", "cluster", "launch", "ds_configs")

CODE = f"""
import importlib, json
from importlib import resources
places = {{name: importlib.import_module(name).__file__ for name in {PACKAGES}}}
names = [each.name for each in resources.files("ds_configs").iterdir()]
policies = sorted(name for name in names if name.endswith(".json"))
print(json.dumps({{"places": places, "policies": policies}}))
"""


def installed_here() -> bool:
    """Tell whether this checkout, and not another one, is what the environment has installed."""
    try:
        direct = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return direct is not None and json.loads(direct).get("url") == ROOT.as_uri()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """Return what a Python that is started in another directory finds."""
    if not installed_here():
        pytest.skip(f"this checkout is not installed in {sys.prefix}; run: pip install --no-deps -e .")
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path / "empty", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_found_in_this_checkout(elsewhere: Any, package: str) -> None:
    assert Path(elsewhere["places"][package]).resolve() == ROOT / package / "__init__.py"


def test_policies_are_found_beside_their_package(elsewhere: Any) -> None:
    assert elsewhere["policies"] == sorted(file.name for file in (ROOT / "ds_configs").glob("*.json"))


def test_every_folder_of_a_package_is_a_regular_one() -> None:
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
