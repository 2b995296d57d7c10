"""The package and its data files are found in a checkout, a wheel and a submitted working_dir.

Ray puts the working directory of a job first on `sys.path`, and a project may have packages named `launch`,
`cluster` or `ds_configs`, like the top-level folders of this repository.
"""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from orchestrator import __version__
from orchestrator.config import loader
from orchestrator.package_data import RESOURCES, ROOT
from orchestrator.submit import working_dir
from orchestrator.train import ray_session

pytestmark = pytest.mark.process

DISTRIBUTION = "orchestrator-llm-trainer"
FOREIGN_PACKAGES = ("launch", "cluster", "ds_configs")
JOB = ROOT / "launch" / "jobs" / "quickstart.yaml"
CODE = f"""
import json, orchestrator
from orchestrator.cluster.hardware import device
from orchestrator.package_data import resource
found = {{name: str(resource(name)) for name in {RESOURCES!r}}}
policies = sorted(path.name for path in resource("ds_configs").glob("*.json"))
gpu = device("H100-80G-SXM").name
print(json.dumps({{"package": orchestrator.__file__, "found": found, "policies": policies, "gpu": gpu}}))
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Return a project with packages of the same names that fail on import."""
    folder = tmp_path / "project"
    for name in FOREIGN_PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('of another project')\n")
    return folder


def found_by(python_path: Path | None, cwd: Path) -> dict[str, Any]:
    """Return the package and data files that Python finds with `cwd` first on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_plan(*options: str, cwd: Path, python_path: Path) -> dict[str, Any]:
    """Return the output of `orchestrator plan` for the quickstart job, which reads policies and catalogue."""
    done = subprocess.run(
        [
            sys.executable,
            *options,
            "-m",
            "orchestrator",
            "plan",
            str(JOB),
            "--gpus",
            "8xA100-80G-SXM",
            "--json",
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def assert_complete(found: dict[str, Any], package: Path, resources: Path) -> None:
    assert Path(found["package"]).resolve() == (package / "__init__.py").resolve()
    assert found["found"] == {name: str(resources / name) for name in RESOURCES}
    assert found["policies"] == sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
    assert found["gpu"] == "H100-80G-SXM"


def is_installed_from_here() -> bool:
    """Return whether this checkout is installed in the environment."""
    try:
        direct = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return direct is not None and json.loads(direct).get("url") == ROOT.as_uri()


def test_an_editable_install_is_found_among_foreign_packages(foreign: Path) -> None:
    if not is_installed_from_here():
        pytest.skip(f"this checkout is not installed in {sys.prefix}; run: pip install --no-deps -e .")
    assert_complete(found_by(None, foreign), ROOT / "orchestrator", ROOT)


def test_a_checkout_is_found_among_foreign_packages(foreign: Path) -> None:
    assert_complete(found_by(ROOT, foreign), ROOT / "orchestrator", ROOT)
    run_plan(cwd=foreign, python_path=ROOT)


def test_a_working_dir_is_found_among_foreign_packages(foreign: Path) -> None:
    (foreign / "orchestrator").mkdir()  # `submit` also works in a project with a package of this name
    (foreign / "orchestrator" / "__init__.py").write_text("raise RuntimeError('of another project')\n")
    uploaded = foreign.parent / "working_dir"
    uploaded.mkdir()
    job = loader.load(JOB, ["checkpoint.storage=/mnt/runs"])
    working_dir.create_working_dir(job, uploaded)
    found = found_by(None, uploaded)
    assert_complete(found, uploaded / "orchestrator", uploaded / "orchestrator" / "_bundled")
    run_plan("-P", cwd=foreign, python_path=uploaded)


def test_a_wheel_is_found_among_foreign_packages(foreign: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", str(ROOT)]
    done = subprocess.run(build, cwd=foreign.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (foreign.parent / "dist").glob("*.whl")
    site = foreign.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    top_level = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert top_level == {"orchestrator"}
    assert (site / "orchestrator" / "py.typed").exists()
    assert wheel.name.split("-")[1] == __version__
    assert_complete(found_by(site, foreign), site / "orchestrator", site / "orchestrator" / "_bundled")
    assert run_plan(cwd=foreign, python_path=site) == run_plan(cwd=foreign, python_path=ROOT)


def test_every_folder_of_the_package_is_a_regular_package() -> None:
    folders = {file.parent for file in (ROOT / "orchestrator").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_old_module_of_the_command_works_in_a_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "validate", str(JOB)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "1 job file valid\n"), done.stderr


def test_earlier_module_names_still_import() -> None:
    code = "from launch.submit import submit; from orchestrator.jobfile import load; print(load.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "orchestrator.config.loader\n"), done.stderr
    assert importlib.import_module("orchestrator.train.session").connected is ray_session.connected
