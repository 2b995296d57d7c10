"""Fixture that builds manifests with kustomize."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

_OLDEST_KUSTOMIZE = (5, 0)  # replacements of whole sections, and patches in components


@cache
def _unusable() -> str | None:
    """Return why kubectl cannot build the manifests."""
    if shutil.which("kubectl") is None:
        return "kubectl is not installed; 1.27 or later builds the manifests"
    done = subprocess.run(
        ["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=False
    )
    version = json.loads(done.stdout or "{}").get("kustomizeVersion", "none")
    found = re.match(r"v(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) >= _OLDEST_KUSTOMIZE:
        return None
    return f"kubectl's kustomize is {version}; 5.0 or later builds the manifests (kubectl 1.27)"


def _build(folder: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_built(folder)))


@cache
def _built(folder: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", folder], cwd=ROOT / "k8s", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def build() -> Any:
    """Return a function that builds a folder of k8s/ with kustomize and returns its objects."""
    reason = _unusable()
    if reason:
        pytest.skip(reason)
    return _build
