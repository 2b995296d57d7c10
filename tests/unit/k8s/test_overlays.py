"""Every overlay builds, passes strict schemas and the lint, and follows the rules of this repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster.hardware import CATALOGUE
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.kubernetes.pod_sizing import GIB, RAY_PORTS, PodOptions, size_pods
from orchestrator.kubernetes.rayjob import PART_OF, documents, dump, rayjob_spec
from orchestrator.metrics.catalogue import PREFIX
from orchestrator.metrics.endpoint import AUTO_PORTS
from tests.conftest import ENVIRONMENT, ROOT
from tests.support.kubernetes_lint import problems_of
from tests.unit.k8s.schemas import core_problem, custom_problems, is_custom, pods, templates

pytestmark = pytest.mark.process

BASE = ROOT / "k8s" / "base"
OVERLAYS = sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir())
COMPONENTS = sorted(folder.name for folder in (ROOT / "k8s" / "components").iterdir())
BUILT = ["base", *(f"overlays/{name}" for name in OVERLAYS)]
# Options with which `render` reproduces the pods of the GPU overlays.
NODES = {
    "a100x8": PodOptions(gpus_per_node=8, cpus_per_node=64, memory_per_node=512),
    "h100-rdma": PodOptions(gpus_per_node=8, cpus_per_node=96, memory_per_node=1024),
}
NEEDS_MORE_THAN_BASELINE = {"h100-rdma"}


def of_kind(objects: Any, *kinds: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] in kinds]


def ray_objects(objects: Any) -> list[dict[str, Any]]:
    found = of_kind(objects, "RayJob", "RayCluster")
    assert len(found) == 1
    return found


def cluster_of(ray: dict[str, Any]) -> Any:
    return ray["spec"].get("rayClusterSpec", ray["spec"])


def job_of(name: str) -> JobSpec:
    file = ROOT / "k8s" / "overlays" / name / "job.yaml"
    return loader.load(file if file.exists() else BASE / "job.yaml")


def test_expected_overlays_and_components_exist() -> None:
    assert {"cpu-smoke", "a100x8", "h100-rdma", "long-lived"} <= set(OVERLAYS)
    assert {"kueue", "volcano", "rdma", "storage", "s3", "monitoring"} <= set(COMPONENTS)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_is_used_by_an_overlay(name: str) -> None:
    kustomizations = [yaml.safe_load(path.read_text()) for path in (ROOT / "k8s/overlays").glob("*/kust*")]
    assert f"../../components/{name}" in {part for item in kustomizations for part in item["components"]}


def test_the_readme_lists_all_overlays_and_components() -> None:
    listed = {}
    for line in (ROOT / "k8s" / "README.md").read_text().splitlines():
        if found := re.match(r"\| `([\w-]+)` \|.*\| (.*) \|", line):
            listed[found[1]] = set(found[2].split(", "))
    listed["long-lived"] = listed["long-lived"] - {"those"}
    assert listed == {
        name: {Path(part).name for part in yaml.safe_load(file.read_text())["components"]}
        for name in OVERLAYS
        for file in [ROOT / "k8s" / "overlays" / name / "kustomization.yaml"]
    }


@pytest.mark.parametrize("folder", [*BUILT, "monitoring"])
def test_custom_objects_pass_their_strict_crd_schemas(build: Any, folder: str) -> None:
    for document in build(folder):
        assert not is_custom(document) or list(custom_problems(document)) == []


@pytest.mark.parametrize("folder", [*BUILT, "monitoring"])
def test_core_objects_pass_the_kubernetes_schema(build: Any, folder: str) -> None:
    for document in build(folder):
        assert is_custom(document) or core_problem(document) is None


@pytest.mark.parametrize("folder", BUILT)
def test_pods_pass_the_kubernetes_schema(build: Any, folder: str) -> None:
    for ray in ray_objects(build(folder)):
        assert {role: core_problem(pod) for role, pod in pods(ray) if core_problem(pod)} == {}


@pytest.mark.parametrize("folder", BUILT)
def test_the_lint_finds_nothing(build: Any, folder: str) -> None:
    assert [problem for document in build(folder) for problem in problems_of(document)] == []


@pytest.mark.parametrize("folder", BUILT)
def test_pods_pass_the_restricted_security_standard(build: Any, folder: str) -> None:
    for ray in ray_objects(build(folder)):
        for role, pod in pods(ray):
            spec, in_rdma = pod["spec"], folder.endswith("h100-rdma") and role == "workers"
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert spec["automountServiceAccountToken"] is False
            assert spec.get("hostNetwork", False) is in_rdma
            for container in spec["containers"]:
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"]["drop"] == ["ALL"]
                assert security["capabilities"].get("add") == (["IPC_LOCK"] if in_rdma else None)
                assert any("NCCL" in item["name"] for item in container["env"]) is in_rdma


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "long-lived"])
def test_the_namespace_has_the_security_level_of_its_pods(build: Any, name: str) -> None:
    objects = build(f"overlays/{name}")
    (namespace,) = of_kind(objects, "Namespace")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("privileged" if name in NEEDS_MORE_THAN_BASELINE else "restricted")
    inside = {item["metadata"].get("namespace") for item in objects if item["kind"] != "Namespace"}
    assert inside == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("folder", BUILT)
def test_requests_equal_limits_and_shared_memory_is_bounded(build: Any, folder: str) -> None:
    for ray in ray_objects(build(folder)):
        for role, pod in pods(ray):
            (container,) = pod["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            mounts = {item["mountPath"]: item["name"] for item in container["volumeMounts"]}
            volumes = {item["name"]: item for item in pod["spec"]["volumes"]}
            assert set(mounts.values()) == set(volumes)
            assert {"/tmp", "/home/ray"} <= set(mounts)  # the root file system is read-only
            if role == "submitter":
                continue
            shm = volumes[mounts["/dev/shm"]]["emptyDir"]
            memory = container["resources"]["limits"]["memory"]
            assert shm["medium"] == "Memory"
            assert _gib(shm["sizeLimit"]) <= _gib(memory) // 2
            group = "headGroupSpec" if role == "head" else "workerGroupSpecs"
            groups = cluster_of(ray)[group]
            parameters = (groups if role == "head" else groups[0])["rayStartParams"]
            # Ray falls back to slow files on disk if its object store does not fit.
            assert int(parameters["object-store-memory"]) < _gib(shm["sizeLimit"]) * GIB


def _gib(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("folder", BUILT)
def test_the_world_size_is_fixed_and_the_head_runs_no_worker(build: Any, folder: str) -> None:
    for ray in ray_objects(build(folder)):
        cluster = cluster_of(ray)
        (group,) = cluster["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        assert not cluster.get("enableInTreeAutoscaling", False)
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["authOptions"] == {"mode": "token"}
        roles = dict(pods(ray))
        assert "gpu" not in json.dumps(roles["head"]).lower()
        job = job_of(Path(folder).name.replace("long-lived", "a100x8"))
        limits = roles["workers"]["spec"]["containers"][0]["resources"]["limits"]
        per_pod = int(limits.get("nvidia.com/gpu", job.parallel.workers // group["replicas"]))
        assert ("nvidia.com/gpu" in limits) == (job.parallel.device == "cuda")
        assert per_pod * group["replicas"] == job.parallel.workers


@pytest.mark.parametrize("folder", BUILT)
def test_secrets_are_referenced_and_never_included(build: Any, folder: str) -> None:
    objects = build(folder)
    assert of_kind(objects, "Secret") == []
    for ray in ray_objects(objects):
        for _, pod in pods(ray):
            for variable in pod["spec"]["containers"][0]["env"]:
                secret = re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"])
                assert not secret or set(variable["valueFrom"]) == {"secretKeyRef"}
        redis = cluster_of(ray).get("gcsFaultToleranceOptions")
        assert not redis or set(redis["redisPassword"]["valueFrom"]) == {"secretKeyRef"}


@pytest.mark.parametrize("folder", BUILT)
def test_policies_and_monitors_select_existing_pods(build: Any, folder: str) -> None:
    objects = build(folder)
    (ray,) = ray_objects(objects)
    assert of_kind(objects, "NetworkPolicy")
    for _, template in templates(ray):
        assert template["metadata"]["labels"].items() >= PART_OF.items()
    for policy in of_kind(objects, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"] == PART_OF
    ports = {
        role: {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0].get("ports", [])}
        for role, pod in pods(ray)
    }
    roles = {"head": "head", "worker": "workers"}  # labels set by KubeRay
    for monitor in of_kind(objects, "PodMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        assert labels.items() >= PART_OF.items()
        found = ports[roles[labels["ray.io/node-type"]]]
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= set(found)


def test_ports_and_metric_names_match_the_code(build: Any) -> None:
    objects = build("overlays/a100x8")
    port = AUTO_PORTS[0]
    (ray,) = ray_objects(objects)
    head = {
        port["name"]: port["containerPort"]
        for port in dict(pods(ray))["head"]["spec"]["containers"][0]["ports"]
    }
    assert head == {**RAY_PORTS, "orch-metrics": port}
    (policy,) = [
        item for item in of_kind(objects, "NetworkPolicy") if "monitoring" in item["metadata"]["name"]
    ]
    opened = {item["port"] for item in policy["spec"]["ingress"][0]["ports"]}
    assert opened == {port, *(RAY_PORTS[name] for name in ("metrics", "as-metrics", "dash-metrics"))}
    endpoints = of_kind(objects, "PodMonitor")[0]["spec"]["podMetricsEndpoints"]
    (own,) = [item for item in endpoints if item["port"] == "orch-metrics"]
    assert own["metricRelabelings"][0]["regex"] == f"{PREFIX}.*"
    assert not any(
        "targetLabel" in item and item["targetLabel"] in ("job", "instance") for item in own["relabelings"]
    )


@pytest.mark.parametrize("name", sorted(NODES))
def test_an_overlay_matches_the_rendered_job(build: Any, name: str) -> None:
    (ray,) = ray_objects(build(f"overlays/{name}"))
    job = job_of(name)
    rendered = rayjob_spec(job, NODES[name], size_pods(job, NODES[name], "cuda"), "orchestrator-job")
    added = {"rdma/hca_shared_devices_a"}
    spec = json.loads(json.dumps(ray["spec"]))
    if "volcano.sh/queue-name" in ray["metadata"]["labels"]:  # time in its queue counts as running
        assert "preRunningDeadlineSeconds" not in spec
        del rendered["preRunningDeadlineSeconds"]
    (group,), (rendered_group,) = (
        spec["rayClusterSpec"]["workerGroupSpecs"],
        rendered["rayClusterSpec"]["workerGroupSpecs"],
    )
    for pod in (group["template"]["spec"], spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]):
        container = pod["containers"][0]
        container["env"] = container["env"][:3]  # components add secrets and NCCL settings
        container["securityContext"]["capabilities"].pop("add", None)
        for amounts in container["resources"].values():
            for extra in added:
                amounts.pop(extra, None)
        for extra in ("hostNetwork", "dnsPolicy", "nodeSelector"):
            pod.pop(extra, None)
    assert group == rendered_group
    assert spec == rendered


@pytest.mark.parametrize("name", sorted(NODES))
def test_node_selectors_name_a_device_of_the_catalogue(build: Any, name: str) -> None:
    (ray,) = ray_objects(build(f"overlays/{name}"))
    product = dict(pods(ray))["workers"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]
    assert f'"{product.replace("-", " ")}"' in CATALOGUE.read_text().replace("-", " ")


@pytest.mark.parametrize(
    "folder", [f"overlays/{name}" for name in OVERLAYS if name != "long-lived"] + ["base"]
)
def test_the_embedded_job_is_valid_and_its_endpoint_is_reachable(build: Any, folder: str) -> None:
    (config,) = of_kind(build(folder), "ConfigMap")
    job = loader.parse(config["data"]["job.yaml"])
    assert job == job_of(Path(folder).name)
    assert job.metrics.host == "0.0.0.0"
    assert job.parallel.device != "auto"
    (ray,) = ray_objects(build(folder))
    head = dict(pods(ray))["head"]["spec"]
    (volume,) = [item for item in head["volumes"] if item["name"] == "job"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_the_long_lived_cluster_matches_the_cluster_of_the_job(build: Any) -> None:
    objects = build("overlays/long-lived")
    assert of_kind(objects, "RayJob", "ConfigMap") == []
    (ray,) = ray_objects(objects)
    (job,) = ray_objects(build("overlays/a100x8"))
    cluster = json.loads(json.dumps(job["spec"]["rayClusterSpec"]))
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [item for item in head["volumes"] if item["name"] != "job"]
    mounts = head["containers"][0]["volumeMounts"]
    head["containers"][0]["volumeMounts"] = [item for item in mounts if item["name"] != "job"]
    redis = ray["spec"].pop("gcsFaultToleranceOptions")
    assert redis["redisAddress"] == "redis:6379"
    assert ray["spec"] == cluster
    assert ray["metadata"]["labels"] == job["metadata"]["labels"]


def test_the_base_matches_the_rendered_job() -> None:
    job, options = loader.load(BASE / "job.yaml"), PodOptions(nodes=2)
    sizing = size_pods(job, options, "cpu")
    _, rayjob = documents(job, options, sizing)
    rayjob["metadata"] = {"name": "orchestrator", "labels": PART_OF}
    rayjob["spec"] = rayjob_spec(job, options, sizing, "orchestrator-job")
    file = BASE / "rayjob.yaml"
    comments = "".join(line for line in file.read_text().splitlines(True) if line.startswith("#"))
    if os.environ.get("GOLDEN_UPDATE"):
        file.write_text(comments + dump(rayjob))
    assert file.read_text() == comments + dump(rayjob), (
        "run with GOLDEN_UPDATE=1 and commit k8s/base/rayjob.yaml"
    )


def test_the_lint_accepts_kustomize_output(build: Any) -> None:
    text = yaml.safe_dump_all(build("overlays/a100x8"))
    broken = text.replace("K8sJobMode", "Foo")
    results = [
        subprocess.run(
            [sys.executable, "-m", "tests.support.kubernetes_lint", "-"],
            input=item, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )
        for item in (text, broken)
    ]  # fmt: skip
    assert (results[0].returncode, results[0].stderr) == (0, "")
    assert results[1].returncode == 2
    assert "submissionMode=Foo" in results[1].stderr
