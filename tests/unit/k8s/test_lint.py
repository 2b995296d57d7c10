"""The lint finds every injected error and reports value, rule and remedy; valid manifests pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import loader
from orchestrator.kubernetes.pod_sizing import PodOptions, size_pods
from orchestrator.kubernetes.rayjob import documents
from tests.conftest import ROOT
from tests.support import kubernetes_lint
from tests.support.kubernetes_lint import lint, problems_of
from tests.unit.k8s.schemas import core_problem, custom_problems


def rayjob() -> dict[str, Any]:
    job = loader.load(ROOT / "k8s" / "base" / "job.yaml")
    return documents(job, PodOptions(nodes=2), size_pods(job, PodOptions(nodes=2), "cpu"))[1]


def raycluster() -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "cluster"},
        "spec": rayjob()["spec"]["rayClusterSpec"],
    }


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return an object with the value at a dotted path set, or removed if the value is None."""
    found = copy.deepcopy(document)
    target: Any = found
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in parents:
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[part]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return found


HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
PORT = "template.spec.containers.0.ports.0.name"
RULES = [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]

INJECTED = {
    "unknown submission mode": ({"spec.submissionMode": "Foo"}, ["submissionMode=Foo", "K8sJobMode"]),
    "TTL without shutdown": (
        {"spec.shutdownAfterJobFinishes": False},
        ["ttlSecondsAfterFinished=600", "shutdownAfterJobFinishes: true"],
    ),
    "long port name of the head": ({f"{HEAD}.{PORT}": "a-name-of-16-chr"}, ["a-name-of-16-chr", "15"]),
    "long port name of a worker": ({f"{WORKERS}.{PORT}": "a-name-of-16-chr"}, ["a-name-of-16-chr", "15"]),
    "long name": ({"metadata.name": "a" * 48}, ["48", "at most 47", "shorten"]),
    "name that starts with a digit": ({"metadata.name": "1a"}, ["1a", "DNS-1035"]),
    "name with a dot": ({"metadata.name": "a.b"}, ["a.b", "DNS-1035"]),
    "name in capitals": ({"metadata.name": "Run"}, ["Run", "DNS-1035"]),
    "name that ends with a dash": ({"metadata.name": "a-"}, ["a-", "DNS-1035"]),
    "no name": ({"metadata.name": None}, ["metadata.name=None"]),
    "min above max": ({f"{WORKERS}.minReplicas": 3}, ["minReplicas=3", "maxReplicas=2"]),
    "no min": ({f"{WORKERS}.minReplicas": None}, ["no minReplicas", "equal to replicas"]),
    "no max": ({f"{WORKERS}.maxReplicas": None}, ["no maxReplicas", "2147483647"]),
    "replicas outside": ({f"{WORKERS}.replicas": 5}, ["replicas=5", "maxReplicas=2"]),
    "resources twice at the head": ({f"{HEAD}.resources": {"CPU": "1"}}, ["num-cpus", "CPU", "keep either"]),
    "resources twice at a worker": (
        {f"{WORKERS}.resources": {"GPU": "1"}, f"{WORKERS}.rayStartParams.num-gpus": "1"},
        ["num-gpus", "GPU", "keep either"],
    ),
    "retries on an existing cluster": (
        {"spec.clusterSelector": {"ray.io/cluster": "c"}},
        ["backoffLimit=2", "clusterSelector"],
    ),
    "deletion rules with shutdown": (
        {"spec.deletionStrategy": {"deletionRules": RULES}},
        ["deletionRules", "shutdownAfterJobFinishes"],
    ),
    "Ray without tokens": ({"spec.rayClusterSpec.rayVersion": "2.51.1"}, ["rayVersion=2.51.1", "2.52"]),
    "tokens without version": ({"spec.rayClusterSpec.rayVersion": None}, ["rayVersion=missing", "2.52"]),
    "invalid version": ({"spec.rayClusterSpec.rayVersion": "latest"}, ["rayVersion=latest", "2.52"]),
    "runtime environment with invalid YAML": ({"spec.runtimeEnvYAML": "a: [1"}, ["runtimeEnvYAML='a: [1'"]),
    "runtime environment that is not a mapping": ({"spec.runtimeEnvYAML": "pip"}, ["runtimeEnvYAML='pip'"]),
    "suspended without shutdown": (
        {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": None},
        ["suspend=true", "shutdownAfterJobFinishes: true"],
    ),
    "submitter pod in SidecarMode": (
        {"spec.submissionMode": "SidecarMode"},
        ["SidecarMode", "submitterPodTemplate"],
    ),
    "interactive with retries": ({"spec.submissionMode": "InteractiveMode"}, ["backoffLimit=2", "remove it"]),
    "no cluster": ({"spec.rayClusterSpec": None}, ["neither rayClusterSpec nor clusterSelector"]),
    "zero deadline": ({"spec.activeDeadlineSeconds": 0}, ["activeDeadlineSeconds=0", "above 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", INJECTED)
def test_an_injected_error_is_reported(name: str) -> None:
    changes, expected = INJECTED[name]
    document = rayjob()
    for path, value in changes.items():
        document = changed(document, path, value)
    (problem,) = problems_of(document)
    assert problem.startswith("RayJob/")
    assert [part for part in expected if part not in problem] == []
    assert len(problem.split(";")) >= 2, "the rule is followed by a remedy"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("metadata.name", "a" * 54, "at most 53"),
        ("spec.rayVersion", "2.9.0", "2.52"),
        ("spec.workerGroupSpecs.0.minReplicas", 9, "minReplicas=9"),
        ("spec.headGroupSpec.resources", {"CPU": "1"}, "num-cpus"),
    ],
)
def test_ray_clusters_are_linted(path: str, value: Any, expected: str) -> None:
    assert problems_of(raycluster()) == []
    (problem,) = problems_of(changed(raycluster(), path, value))
    assert expected in problem


def test_valid_manifests_pass() -> None:
    assert problems_of(rayjob()) == []
    for name in ("a", "a" * 47, "a-1"):
        assert problems_of(changed(rayjob(), "metadata.name", name)) == []
    for version in ("2.52.0", "2.100.0", "3.0.0"):
        assert problems_of(changed(rayjob(), "spec.rayClusterSpec.rayVersion", version)) == []
    assert problems_of(changed(rayjob(), f"{HEAD}.{PORT}", "a-name-of-15-ch")) == []
    assert problems_of(changed(rayjob(), "spec.runtimeEnvYAML", "env_vars: {A: b}")) == []
    no_tokens = changed(rayjob(), "spec.rayClusterSpec.authOptions", {"mode": "disabled"})
    assert problems_of(changed(no_tokens, "spec.rayClusterSpec.rayVersion", "2.40.0")) == []


def test_all_errors_are_reported_and_other_kinds_are_ignored() -> None:
    document = changed(changed(rayjob(), "metadata.name", "A"), "spec.submissionMode", "Foo")
    text = yaml.safe_dump_all([document, {"kind": "ConfigMap"}, None, 3])
    assert len(lint(text)) == 2


def paths_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted path of every nested value; keys with dots are skipped."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        if "." not in str(key):
            yield ".".join((*path, str(key)))
            if isinstance(child, (dict, list)):
                yield from paths_of(child, (*path, str(key)))


def test_no_yaml_value_causes_an_exception() -> None:
    document = rayjob()
    paths = list(paths_of(document))
    assert f"{HEAD}.{PORT}" in paths
    for path in paths:
        for value in ("x", 3, 1.5, True, [], [1], [None], {}, {"a": 1}):
            assert isinstance(problems_of(changed(document, path, value)), list)


def test_the_command_names_the_file_of_each_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, broken = (tmp_path / name for name in ("good.yaml", "bad.yaml", "broken.yaml"))
    good.write_text(yaml.safe_dump(rayjob()))
    bad.write_text(yaml.safe_dump(changed(rayjob(), "spec.submissionMode", "Foo")))
    broken.write_text("a: [1")
    assert kubernetes_lint.main([str(good)]) == 0
    assert capsys.readouterr().err == ""
    assert kubernetes_lint.main([str(path) for path in (good, bad, broken, tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(bad), str(broken), str(tmp_path / "none")]
    assert kubernetes_lint.main([]) == 2


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec.replicas", 2, "replicas"),
        (f"{WORKERS}.replica", 2, "replica"),
        (f"{HEAD}.template.spec.volumes.0.emptyDir.sizelimit", "1Gi", "sizelimit"),
        ("spec.ttlSecondsAfterFinished", "600", "integer"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "tokens"),
    ],
)
def test_typos_that_the_lint_ignores_are_rejected_by_the_strict_schema(
    path: str, value: Any, expected: str
) -> None:
    assert list(custom_problems(rayjob())) == []
    problems = list(custom_problems(changed(rayjob(), path, value)))
    assert len(problems) == 1
    assert expected in problems[0]


def test_a_typo_in_a_pod_is_rejected_by_the_kubernetes_schema() -> None:
    spec = rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": spec}
    assert core_problem(pod) is None
    assert "runAsnonRoot" in str(core_problem(changed(pod, "spec.securityContext.runAsnonRoot", True)))
