"""Renders a job as a KubeRay RayJob with the job file in a ConfigMap and one worker pod per node."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import yaml

from orchestrator import __version__
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.kubernetes.pod_sizing import GIB, RAY_PORTS, PodOptions, PodSizing, size_pods
from orchestrator.metrics.endpoint import AUTO_PORTS

RAY_VERSION = "2.60.0"  # must match the images: KubeRay selects its probes by version
IMAGES = {device: f"orchestrator:{__version__}-{device}" for device in ("cuda", "cpu")}
"""Image names as built in k8s/README.md; they are not in any registry."""

KubeObject = dict[str, Any]
"""A Kubernetes object or a part of one, as it is written to YAML."""

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
# Defaults, not measured.
_HEAD_CPUS, _HEAD_BYTES, _HEAD_STORE_BYTES, _HEAD_SHM_BYTES = 4, 8 * GIB, GIB, 2 * GIB


def manifest(job: JobSpec, options: PodOptions, device: Literal["cuda", "cpu"]) -> str:
    """Return the YAML of a job for `kubectl apply --server-side -f -`.

    Args:
        job: The job.
        options: Command-line options.
        device: Device type of the workers.

    Raises:
        SpecError: As for `size_pods`.
    """
    sizing = size_pods(job, options, device)
    lines = [
        f"{sizing.nodes} x {sizing.workers} workers on {sizing.device}; the claim {options.claim} must exist "
        "and be writable by all pods",
        *sizing.notes,
        *_notes(job),
        f"KubeRay terminates an attempt after {options.deadline_hours} hours (--deadline-hours)",
        "kubectl apply --server-side -f FILE",
    ]
    parts = [dump(part) for part in documents(job, options, sizing)]
    return "".join(f"# {line}\n" for line in lines) + "---\n".join(parts)


def documents(job: JobSpec, options: PodOptions, sizing: PodSizing) -> tuple[KubeObject, KubeObject]:
    """Return the ConfigMap with the job file and the RayJob that runs it.

    Args:
        job: The job.
        options: Command-line options.
        sizing: Number and resources of the worker pods.
    """
    name = object_name(job.name)
    text = loader.dump(_in_pods(job, sizing.device))
    # Named by its content, so that a running RayJob keeps the job file it was started with.
    config = f"{name}-job-{_digest(text)}"
    namespace = {"namespace": options.namespace} if options.namespace else {}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config, **namespace, "labels": PART_OF},
        "immutable": True,
        "data": {"job.yaml": text},
    }
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, **namespace, "labels": PART_OF},
        "spec": rayjob_spec(job, options, sizing, config),
    }
    return config_map, rayjob


def rayjob_spec(job: JobSpec, options: PodOptions, sizing: PodSizing, config_map: str) -> KubeObject:
    """Return the `spec` of the RayJob.

    Each retry by `backoffLimit` starts a new cluster; the run resumes from its newest checkpoint on the
    shared volume, which is found by the run's name.

    Args:
        job: The job.
        options: Command-line options.
        sizing: Number and resources of the worker pods.
        config_map: Name of the ConfigMap with the job file.
    """
    image = options.image or IMAGES[sizing.device]
    return {
        "submissionMode": "K8sJobMode",
        # Parsed by two shells: no quotes, pipes or variables.
        "entrypoint": f"orchestrator train {JOB_FOLDER}/job.yaml --address auto",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _TTL_SECONDS,
        "activeDeadlineSeconds": options.deadline_hours * 3600,
        "preRunningDeadlineSeconds": _PRE_RUNNING_SECONDS,
        "backoffLimit": _RETRIES,
        "submitterPodTemplate": _submitter(image),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": _head(job, options, image, config_map),
            "workerGroupSpecs": [_workers(job, options, sizing, image)],
        },
    }


def object_name(run: str) -> str:
    """Return a unique DNS-1035 label of at most 47 characters for a run's name."""
    name = re.sub(r"[^a-z0-9-]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if name == run and len(name) <= LONGEST_RAYJOB_NAME:
        return name
    suffix = f"-{_digest(run)}"
    return name[: LONGEST_RAYJOB_NAME - len(suffix)].rstrip("-") + suffix


def secret_name(run: str) -> str:
    """Return the name of the Secret with the values of `run.env`."""
    return f"{object_name(run)}-env"


def dump(value: object) -> str:
    """Return a value as YAML with multi-line strings as block scalars."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and multi-line strings as block scalars."""

    def ignore_aliases(self, data: object) -> bool:
        """Repeat shared values instead of using aliases."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _in_pods(job: JobSpec, device: Literal["cuda", "cpu"]) -> JobSpec:
    """Return the job with a metrics endpoint that Prometheus can reach and an explicit device.

    With device: auto, a pod that does not see its GPUs would silently train on CPU.
    """
    parallel = job.parallel.model_copy(update={"device": device})
    metrics = job.metrics
    if metrics.host in _LOOPBACK:
        metrics = metrics.model_copy(update={"host": "0.0.0.0"})
    if metrics.port in ("auto", 0):  # a pod does not share its ports and must declare them
        metrics = metrics.model_copy(update={"port": AUTO_PORTS[0]})
    return job.model_copy(update={"parallel": parallel, "metrics": metrics})


def _notes(job: JobSpec) -> list[str]:
    notes = []
    if job.metrics.port is not None and job.metrics.host in _LOOPBACK:
        notes.append(f"metrics.host={job.metrics.host} was set to 0.0.0.0 so that Prometheus can reach it")
    if job.metrics.port in ("auto", 0):
        notes.append(f"metrics.port={job.metrics.port} was set to {AUTO_PORTS[0]}, which the pod declares")
    if job.run.env:
        literals = " ".join(f"--from-literal={name}=..." for name in job.run.env)
        notes.append(
            "values of run.env are not included; the head pod reads them from a Secret: kubectl create "
            f"secret generic {secret_name(job.name)} {literals}"
        )
    if job.parallel.offload_path:
        notes.append(
            f"parallel.offload_path={job.parallel.offload_path} is an emptyDir on the kubelet's disk; "
            "replace it if the node has a faster disk"
        )
    return notes


def _quantity(size_bytes: int) -> str:
    return f"{size_bytes // GIB}Gi"


def _resources(cpus: int | str, memory: str, gpus: int = 0) -> KubeObject:
    """Return equal requests and limits (QoS class Guaranteed), so that the pod is evicted last."""
    amounts = {"cpu": str(cpus), "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}


def _pod(containers: list[KubeObject], volumes: list[KubeObject], **fields: object) -> KubeObject:
    """Return a pod that passes the `restricted` Pod Security Standard."""
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
            **fields,
            "containers": containers,
            "volumes": volumes,
        },
    }


def _container(
    name: str, image: str, resources: KubeObject, mounts: dict[str, str], **fields: object
) -> KubeObject:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        **fields,
        "env": [
            {"name": "HOME", "value": _HOME},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            # DeepSpeed compiles its ops at first use, and the root file system is read-only.
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


def _volumes(options: PodOptions, shm_bytes: int) -> list[KubeObject]:
    return [
        # KubeRay's default has no sizing limit, and /dev/shm counts towards the pod's memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(shm_bytes)}},
        *({"name": name, "emptyDir": {}} for name in _WRITABLE),
        {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
    ]


def _submitter(image: str) -> KubeObject:
    container = _container("ray-job-submitter", image, _resources("500m", "1Gi"), _WRITABLE)
    volumes = [{"name": name, "emptyDir": {}} for name in _WRITABLE]
    return _pod([container], volumes, restartPolicy="Never")


def _head(job: JobSpec, options: PodOptions, image: str, config_map: str) -> KubeObject:
    """Return the head group; it runs the driver and no worker."""
    ports = [{"name": name, "containerPort": port} for name, port in RAY_PORTS.items()]
    if job.metrics.port is not None:
        port = AUTO_PORTS[0] if job.metrics.port in ("auto", 0) else job.metrics.port
        ports.append({"name": DRIVER_PORT_NAME, "containerPort": port})
    mounts = {"shm": "/dev/shm", **_WRITABLE, "shared": options.mount, "job": JOB_FOLDER}
    resources = _resources(_HEAD_CPUS, _quantity(_HEAD_BYTES))
    container = _container("ray-head", image, resources, mounts, ports=ports)
    container["env"] += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name(job.name), "key": name}}}
        for name in job.run.env
    ]
    volumes = [*_volumes(options, _HEAD_SHM_BYTES), {"name": "job", "configMap": {"name": config_map}}]
    return {
        "rayStartParams": {"num-cpus": "0", "object-store-memory": str(_HEAD_STORE_BYTES)},
        "template": _pod([container], volumes),
    }


def _workers(job: JobSpec, options: PodOptions, sizing: PodSizing, image: str) -> KubeObject:
    """Return the worker group with a fixed number of pods."""
    mounts = {"shm": "/dev/shm", **_WRITABLE, "shared": options.mount}
    volumes = _volumes(options, sizing.shm_bytes)
    if job.parallel.offload_path:
        mounts["offload"] = job.parallel.offload_path
        limit = {} if sizing.disk_bytes is None else {"sizeLimit": _quantity(sizing.disk_bytes)}
        volumes.append({"name": "offload", "emptyDir": limit})
    resources = _resources(sizing.cpus, _quantity(sizing.memory_bytes), sizing.gpus)
    ports = [{"name": "metrics", "containerPort": RAY_PORTS["metrics"]}]
    container = _container("ray-worker", image, resources, mounts, ports=ports)
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    fields = {"tolerations": tolerations} if sizing.gpus else {}
    return {
        "groupName": "workers",
        "replicas": sizing.nodes,
        "minReplicas": sizing.nodes,
        "maxReplicas": sizing.nodes,
        "rayStartParams": {"object-store-memory": str(sizing.object_store_bytes)},
        "template": _pod([container], volumes, **fields),
    }
