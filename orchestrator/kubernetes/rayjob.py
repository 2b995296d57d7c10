"""A job as a KubeRay RayJob: the job file in a ConfigMap, and one pod of workers for each node."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import yaml

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.kubernetes.pod_sizing import GIB, RAY_PORTS, Size, Wanted, size_of
from orchestrator.metrics.endpoint import AUTO_PORTS

RAY_VERSION = "2.60.0"  # KubeRay chooses its probes by it, so it is that of the images
IMAGES = {"cuda": "orchestrator:0.1.0-cuda", "cpu": "orchestrator:0.1.0-cpu"}
"""Names that k8s/README.md builds the images by; they are in no registry."""

LONGEST_RAYJOB_NAME = 47
DRIVER_PORT_NAME = "orch-metrics"
PART_OF = {"app.kubernetes.io/part-of": "orchestrator"}
JOB_FOLDER = "/etc/orchestrator"

_HOME = "/home/ray"
_LOOPBACK = ("127.0.0.1", "localhost")
_USER = 1000
_TTL_SECONDS = 600
_PRE_RUNNING_SECONDS = 3600
_RETRIES = 2
_HEAD_CPUS, _HEAD_BYTES, _HEAD_STORE_BYTES, _HEAD_SHM_BYTES = 4, 8 * GIB, GIB, 2 * GIB  # plain defaults


def manifest(job: JobSpec, wanted: Wanted, device: Literal["cuda", "cpu"]) -> str:
    """Return a job as YAML for `kubectl apply --server-side -f -`.

    Args:
        job: The job.
        wanted: What the user says of the cluster.
        device: What the workers run on where the job says auto.

    Raises:
        SpecError: The job cannot be spread so, or names what no pod sees.
    """
    size = size_of(job, wanted, device)
    lines = [
        f"{size.nodes} x {size.workers} workers on {size.device}; claim {wanted.claim} must exist and be "
        "writable by all pods",
        *size.notes,
        *_notes(job),
        f"KubeRay ends a try after {wanted.deadline_hours} hours (--deadline-hours)",
        "kubectl apply --server-side -f FILE",
    ]
    parts = [dump(part) for part in documents(job, wanted, size)]
    return "".join(f"# {line}\n" for line in lines) + "---\n".join(parts)


def documents(job: JobSpec, wanted: Wanted, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ConfigMap that holds the job file, and the RayJob that runs it.

    Args:
        job: The job.
        wanted: What the user says of the cluster.
        size: How large the pods are.
    """
    name = object_name(job.name)
    text = loader.dump(_in_pods(job, size.device))
    # Named by its content: a RayJob that goes on keeps the job that it was started with.
    config = f"{name}-job-{_digest(text)}"
    place = {"namespace": wanted.namespace} if wanted.namespace else {}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config, **place, "labels": PART_OF},
        "immutable": True,
        "data": {"job.yaml": text},
    }
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, **place, "labels": PART_OF},
        "spec": rayjob_spec(job, wanted, size, config),
    }
    return config_map, rayjob


def rayjob_spec(job: JobSpec, wanted: Wanted, size: Size, config_map: str) -> dict[str, Any]:
    """Return the RayJob's specification.

    A retry by `backoffLimit` is a new cluster: the run goes on from its newest checkpoint on the shared
    volume, which is found by the run's name.

    Args:
        job: The job.
        wanted: What the user says of the cluster.
        size: How large the pods are.
        config_map: Name of the ConfigMap that holds the job file.
    """
    image = wanted.image or IMAGES[size.device]
    return {
        "submissionMode": "K8sJobMode",
        # Two shells read it on its way: no quotes, pipes or variables.
        "entrypoint": f"orchestrator train {JOB_FOLDER}/job.yaml --address auto",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _TTL_SECONDS,
        "activeDeadlineSeconds": wanted.deadline_hours * 3600,
        "preRunningDeadlineSeconds": _PRE_RUNNING_SECONDS,
        "backoffLimit": _RETRIES,
        "submitterPodTemplate": _submitter(image),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": _head(job, wanted, image, config_map),
            "workerGroupSpecs": [_workers(job, wanted, size, image)],
        },
    }


def object_name(run: str) -> str:
    """Return a run's name as Kubernetes takes it: DNS-1035, at most 47 characters, no two alike."""
    name = re.sub(r"[^a-z0-9-]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if name == run and len(name) <= LONGEST_RAYJOB_NAME:
        return name
    mark = f"-{_digest(run)}"
    return name[: LONGEST_RAYJOB_NAME - len(mark)].rstrip("-") + mark


def secret_name(run: str) -> str:
    """Return the name of the Secret that the variables of `run.env` are taken from."""
    return f"{object_name(run)}-env"


def dump(value: Any) -> str:
    """Return a value as YAML, texts of several lines as blocks."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write out what stands in several places."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _in_pods(job: JobSpec, device: Literal["cuda", "cpu"]) -> JobSpec:
    """Return the job with an endpoint that Prometheus reaches, and the device that the pods are made for.

    Left at auto, a node whose GPUs are not seen would have the job train on CPU.
    """
    parallel = job.parallel.model_copy(update={"device": device})
    metrics = job.metrics
    if metrics.host in _LOOPBACK:
        metrics = metrics.model_copy(update={"host": "0.0.0.0"})
    if metrics.port in ("auto", 0):  # a pod has its ports to itself, and says which one is to be scraped
        metrics = metrics.model_copy(update={"port": AUTO_PORTS[0]})
    return job.model_copy(update={"parallel": parallel, "metrics": metrics})


def _notes(job: JobSpec) -> list[str]:
    notes = []
    if job.metrics.port is not None and job.metrics.host in _LOOPBACK:
        notes.append(f"metrics.host={job.metrics.host} became 0.0.0.0, for Prometheus to reach it")
    if job.metrics.port in ("auto", 0):
        notes.append(f"metrics.port={job.metrics.port} became {AUTO_PORTS[0]}, which the pod declares")
    if job.run.env:
        literals = " ".join(f"--from-literal={name}=..." for name in job.run.env)
        notes.append(
            "no value of run.env is in here; the head takes them from a Secret: kubectl create secret "
            f"generic {secret_name(job.name)} {literals}"
        )
    if job.parallel.offload_path:
        notes.append(
            f"parallel.offload_path={job.parallel.offload_path} is an emptyDir, on the disk of the node's "
            "kubelet; put a faster one there where the node has one"
        )
    return notes


def _quantity(size_bytes: int) -> str:
    return f"{size_bytes // GIB}Gi"


def _resources(cpus: int | str, memory: str, gpus: int = 0) -> dict[str, Any]:
    """Return requests equal to limits: a pod has what it was promised, and is the last to be evicted."""
    amounts = {"cpu": str(cpus), "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}


def _pod(containers: list[dict[str, Any]], volumes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a pod that the security standard `restricted` admits."""
    return {
        "metadata": {"labels": PART_OF},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **more,
            "containers": containers,
            "volumes": volumes,
        },
    }


def _container(
    name: str, image: str, resources: dict[str, Any], mounts: dict[str, str], **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        **more,
        "env": [
            {"name": "HOME", "value": _HOME},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            # DeepSpeed compiles its operators at first use, and the root file system is read-only.
            {"name": "TORCH_EXTENSIONS_DIR", "value": f"{_HOME}/torch_extensions"},
        ],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": volume, "mountPath": path, **({"readOnly": True} if volume == "job" else {})}
            for volume, path in mounts.items()
        ],
    }


_WRITABLE = {"tmp": "/tmp", "home": _HOME}


def _volumes(wanted: Wanted, shm_bytes: int) -> list[dict[str, Any]]:
    return [
        # KubeRay's own has no limit, and what lies there counts as the pod's memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(shm_bytes)}},
        *({"name": name, "emptyDir": {}} for name in _WRITABLE),
        {"name": "shared", "persistentVolumeClaim": {"claimName": wanted.claim}},
    ]


def _submitter(image: str) -> dict[str, Any]:
    container = _container("ray-job-submitter", image, _resources("500m", "1Gi"), _WRITABLE)
    volumes = [{"name": name, "emptyDir": {}} for name in _WRITABLE]
    return _pod([container], volumes, restartPolicy="Never")


def _head(job: JobSpec, wanted: Wanted, image: str, config_map: str) -> dict[str, Any]:
    """Return the head, where the driver runs and no worker does."""
    ports = [{"name": name, "containerPort": port} for name, port in RAY_PORTS.items()]
    if job.metrics.port is not None:
        port = AUTO_PORTS[0] if job.metrics.port in ("auto", 0) else job.metrics.port
        ports.append({"name": DRIVER_PORT_NAME, "containerPort": port})
    mounts = {"shm": "/dev/shm", **_WRITABLE, "shared": wanted.mount, "job": JOB_FOLDER}
    resources = _resources(_HEAD_CPUS, _quantity(_HEAD_BYTES))
    container = _container("ray-head", image, resources, mounts, ports=ports)
    container["env"] += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name(job.name), "key": name}}}
        for name in job.run.env
    ]
    volumes = [*_volumes(wanted, _HEAD_SHM_BYTES), {"name": "job", "configMap": {"name": config_map}}]
    return {
        "rayStartParams": {"num-cpus": "0", "object-store-memory": str(_HEAD_STORE_BYTES)},
        "template": _pod([container], volumes),
    }


def _workers(job: JobSpec, wanted: Wanted, size: Size, image: str) -> dict[str, Any]:
    """Return the pods of workers, as many as there are and no other number."""
    mounts = {"shm": "/dev/shm", **_WRITABLE, "shared": wanted.mount}
    volumes = _volumes(wanted, size.shm_bytes)
    if job.parallel.offload_path:
        mounts["offload"] = job.parallel.offload_path
        limit = {} if size.disk_bytes is None else {"sizeLimit": _quantity(size.disk_bytes)}
        volumes.append({"name": "offload", "emptyDir": limit})
    resources = _resources(size.cpus, _quantity(size.memory_bytes), size.gpus)
    ports = [{"name": "metrics", "containerPort": RAY_PORTS["metrics"]}]
    container = _container("ray-worker", image, resources, mounts, ports=ports)
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    more = {"tolerations": tolerations} if size.gpus else {}
    return {
        "groupName": "workers",
        "replicas": size.nodes,
        "minReplicas": size.nodes,
        "maxReplicas": size.nodes,
        "rayStartParams": {"object-store-memory": str(size.object_store_bytes)},
        "template": _pod([container], volumes, **more),
    }
