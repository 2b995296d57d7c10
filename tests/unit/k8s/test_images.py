"""Versions in the Dockerfiles match the project; no test builds the images."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from orchestrator import __version__
from orchestrator.config import loader
from orchestrator.kubernetes.pod_sizing import PodOptions, size_pods
from orchestrator.kubernetes.rayjob import IMAGES, RAY_VERSION, rayjob_spec
from tests.conftest import ROOT

DOCKERFILES = {kind: ROOT / "k8s" / "images" / f"Dockerfile.{kind}" for kind in IMAGES}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==") for line in (ROOT / "constraints" / "cpu.txt").read_text().split() if "==" in line
)


def lines_of(file: Path) -> list[str]:
    """Return a Dockerfile's instructions, one per line."""
    text = re.sub(r"\\\n\s*", "", file.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_ray_version_is_installed_and_pinned() -> None:
    assert metadata.version("ray") == PINS["ray"] == RAY_VERSION


def test_image_tags_match_the_project_version() -> None:
    assert {kind: f"orchestrator:{__version__}-{kind}" for kind in ("cuda", "cpu")} == IMAGES
    readme = (ROOT / "k8s" / "README.md").read_text()
    for kind, file in DOCKERFILES.items():
        command = rf"docker build -f {file.relative_to(ROOT)}\s+-t {re.escape(IMAGES[kind])}\s+\."
        assert re.search(command, readme)
        assert re.search(command, file.read_text())


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_dockerfile_versions_match_constraints_and_project(kind: str) -> None:
    lines = lines_of(DOCKERFILES[kind])
    assert f"ARG RAY_VERSION={PINS['ray']}" in lines
    (base,) = [line for line in lines if line.startswith("FROM python:")]
    assert base == f"FROM python:{PROJECT['tool']['mypy']['python_version']}-slim-bookworm"
    (install,) = [line for line in lines if "pip install" in line]
    assert "--constraint constraints/cpu.txt" in install
    # A version pinned in a Dockerfile could contradict the constraints.
    assert re.findall(r"[\w-]+==[\d.]+", "\n".join(lines)) == []


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_dockerfiles_copy_everything_that_is_installed(kind: str) -> None:
    lines = lines_of(DOCKERFILES[kind])
    copied = [
        name
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *(name.split("/")[0] for name in wheel["force-include"])}
    assert {*needed, "constraints", "pyproject.toml", "README.md"} <= set(copied)
    requested = re.findall(r"\.\[([\w,]+)\]|EXTRAS=([\w,]+)", "\n".join(lines))
    extras = {extra for found in requested for part in found for extra in part.split(",") if extra}
    assert extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_pods_run_as_the_user_and_in_the_home_of_the_image(kind: str) -> None:
    job = loader.load(ROOT / "k8s" / "base" / "job.yaml")
    head = rayjob_spec(job, PodOptions(), size_pods(job, PodOptions(), "cpu"), "c")["rayClusterSpec"][
        "headGroupSpec"
    ]
    pod = head["template"]["spec"]
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
    home = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}["HOME"]
    lines = lines_of(DOCKERFILES[kind])
    assert f"USER {user}:{group}" in lines
    assert f"WORKDIR {home}" in lines
