"""Offline validation against strict versions of the Kubernetes and CRD schemas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT

# Too large to include; read from a folder next to the checkout if present.
CRDS = ROOT.parent / "shared" / "crds"
CORE_VERSION = "1.36"
_FILES = {
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCluster": "ray.io_rayclusters.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}


def strict(schema: Any) -> Any:
    """Return a CRD schema that also rejects typos.

    Unknown fields are rejected, as by `kubectl apply`; fields with a default are optional, since the server
    fills them in.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(child) for name, child in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    fields = schema.get("properties")
    if isinstance(fields, dict):
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
        if isinstance(schema.get("required"), list):
            made["required"] = [name for name in schema["required"] if "default" not in fields.get(name, {})]
    return made


@cache
def _validator(path: Path, version: str) -> jsonschema.Draft202012Validator:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    schemas = {item["name"]: item["schema"]["openAPIV3Schema"] for item in crd["spec"]["versions"]}
    return jsonschema.Draft202012Validator(strict(schemas[version]))


def custom_problems(document: dict[str, Any]) -> Iterator[str]:
    """Yield schema violations of a custom object; skip the test if its CRD is not available."""
    path = CRDS / _FILES[document["kind"]]
    if not path.exists():
        pytest.skip(f"no CRDs in {CRDS}; put those of KubeRay 1.7 and prometheus-operator there")
    version = document["apiVersion"].rsplit("/")[-1]
    for error in _validator(path, version).iter_errors(document):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def core_problem(document: dict[str, Any]) -> str | None:
    """Return what Kubernetes' own schema finds wrong; skip the test where there is no validator."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    try:
        validate.validate(document, CORE_VERSION, strict=True)
    except validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    return None


def is_custom(document: dict[str, Any]) -> bool:
    """Tell whether an object is of a kind that a CRD describes."""
    return document["kind"] in _FILES


def templates(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield role and pod template of each pod that an object creates."""
    spec = document["spec"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield "workers", group["template"]


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield role and Pod object of each pod that an object creates."""
    for role, template in templates(document):
        yield role, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, "spec": template["spec"]}
