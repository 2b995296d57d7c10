"""Rendering a job as a RayJob, and the errors for jobs that cannot run in pods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from orchestrator.arch.parameters import parameter_count
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.kubernetes.pod_sizing import GIB, PodOptions, PodSizing, size_pods
from orchestrator.kubernetes.rayjob import documents, manifest, object_name
from orchestrator.parallel.deepspeed_config import render
from orchestrator.planner.host_memory import FACTOR, disk_bytes, host_memory
from tests.conftest import ROOT, orchestrator
from tests.support.kubernetes_lint import problems_of
from tests.unit.k8s.schemas import core_problem, custom_problems, pods

LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
SEVEN_BILLION = 6_738_415_616  # parameters, as in the model card and in transformers


def job_of(**changes: Any) -> JobSpec:
    """Return a job with 16 workers; `parallel__workers=8` sets the field of a section."""
    job: dict[str, Any] = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": 4096},
        "parallel": {"workers": 16},
        "optim": {"global_batch_size": 16},
        "checkpoint": {"storage": "/mnt/shared/runs"},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            job.setdefault(section, {})[key] = value
        else:
            job[section] = value
    return loader.parse(yaml.safe_dump(job))


def sized(job: JobSpec, device: Literal["cuda", "cpu"] = "cuda", **options: Any) -> PodSizing:
    return size_pods(job, PodOptions(**options), device)


def rayjob_of(job: JobSpec, device: Literal["cuda", "cpu"] = "cuda", **options: Any) -> dict[str, Any]:
    documents = list(yaml.safe_load_all(manifest(job, PodOptions(**options), device)))
    assert [item["kind"] for item in documents] == ["ConfigMap", "RayJob"]
    return documents[1]


def workers_of(rayjob: dict[str, Any]) -> Any:
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


@pytest.mark.parametrize(
    ("workers", "gpus_per_node", "nodes", "gpus"),
    [(16, None, 2, 8), (16, 4, 4, 4), (8, 8, 1, 8), (4, None, 1, 4), (1, 8, 1, 1), (6, 2, 3, 2)],
)
def test_one_pod_per_node_and_one_gpu_per_worker(
    workers: int, gpus_per_node: int | None, nodes: int, gpus: int
) -> None:
    job = job_of(parallel__workers=workers, optim__global_batch_size=workers)
    group = workers_of(rayjob_of(job, gpus_per_node=gpus_per_node))
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [nodes] * 3
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == str(gpus)
    assert resources["requests"] == resources["limits"]
    assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_cpu_jobs_have_the_requested_number_of_pods_and_no_gpu() -> None:
    job = job_of(parallel__workers=4, parallel__cpus_per_worker=2)
    rayjob = rayjob_of(job, "cpu", nodes=2)
    group = workers_of(rayjob)
    assert group["replicas"] == 2
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "5"  # one for Ray
    assert "nvidia" not in json.dumps(rayjob)
    assert workers_of(rayjob_of(job, "cpu"))["replicas"] == 1


JOBS = {
    "gpu": (job_of(), "cuda", {"namespace": "team"}),
    "cpu": (job_of(parallel__workers=2), "cpu", {"nodes": 2}),
    "offloaded": (
        job_of(parallel__offload_optimizer="nvme", parallel__offload_path="/mnt/disk"), "cuda", {}
    ),
    "no metrics endpoint": (job_of(metrics={"port": None}), "cuda", {}),
    "invalid name": (job_of(name="7B_Llama.v2-" + "x" * 50), "cuda", {"image": "r.example:5000/o:1"}),
}  # fmt: skip
PUBLISHED = sorted((ROOT / "launch" / "jobs" / "published" / "xtuner").glob("*.yaml"))


def assert_valid(documents: Any) -> None:
    for document in documents:
        if document["kind"] == "RayJob":
            assert list(custom_problems(document)) == []
            assert {role: core_problem(pod) for role, pod in pods(document) if core_problem(pod)} == {}
        else:
            assert core_problem(document) is None


@pytest.mark.parametrize("name", JOBS)
def test_rendered_manifests_pass_strict_schemas(name: str) -> None:
    job, device, options = JOBS[name]
    assert_valid(yaml.safe_load_all(manifest(job, PodOptions(**options), device)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", JOBS)
def test_rendered_manifests_pass_the_lint_and_contain_the_job(name: str) -> None:
    job, device, options = JOBS[name]
    config, rayjob = yaml.safe_load_all(manifest(job, PodOptions(**options), device))  # type: ignore[arg-type]
    assert problems_of(rayjob) == []
    inside = loader.parse(config["data"]["job.yaml"])
    assert inside.parallel == job.parallel.model_copy(update={"device": device})
    assert inside.metrics.host == "0.0.0.0"
    kept = {"parallel": job.parallel, "metrics": job.metrics}
    assert inside.model_copy(update=kept) == job
    head = dict(pods(rayjob))["head"]["spec"]
    (volume,) = [item for item in head["volumes"] if item["name"] == "job"]
    (mount,) = [item for item in head["containers"][0]["volumeMounts"] if item["name"] == "job"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert f"orchestrator train {mount['mountPath']}/job.yaml --address auto" == rayjob["spec"]["entrypoint"]
    ports = [port["containerPort"] for port in head["containers"][0]["ports"]]
    assert (9400 in ports) == (job.metrics.port is not None)
    assert {item["metadata"].get("namespace") for item in (config, rayjob)} == {options.get("namespace")}
    images = {pod["spec"]["containers"][0]["image"] for _, pod in pods(rayjob)}
    assert images == {options.get("image", f"orchestrator:0.1.0-{device}")}


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_jobs_render(file: Path) -> None:
    job = loader.load(file, ["checkpoint.storage=/mnt/shared/runs"])
    rayjob = rayjob_of(job, deadline_hours=2)
    assert problems_of(rayjob) == []
    assert rayjob["spec"]["activeDeadlineSeconds"] == 7200
    group = workers_of(rayjob)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == job.parallel.workers


def test_the_config_map_name_depends_on_the_job() -> None:
    def name(job: JobSpec) -> str:
        return str(documents(job, PodOptions(), sized(job))[0]["metadata"]["name"])

    assert name(job_of()) == name(job_of())
    assert name(job_of()) != name(job_of(optim__lr=1.0e-3))


@pytest.mark.parametrize("run", ["run", "a" * 47, "llama2-7b-alpaca"])
def test_valid_kubernetes_names_are_unchanged(run: str) -> None:
    assert object_name(run) == run


AWKWARD = [
    "a" * 48,
    "a" * 63,
    "7b",
    "a.b",
    "a_b",
    "A-b",
    "a-",
    "0",
    "a" * 38 + "." + "b" * 20,
    "9.9.9",
    "A" * 63,
]


def test_invalid_names_are_converted_to_distinct_valid_names() -> None:
    made = [object_name(run) for run in AWKWARD]
    assert len(set(made)) == len(AWKWARD)
    for name in made:
        document = {"kind": "RayJob", "metadata": {"name": name}, "spec": {"rayClusterSpec": {}}}
        assert problems_of(document) == []


def written(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_host_memory_of_offloaded_state_is_computed_from_the_config(tmp_path: Path) -> None:
    path, mount = written(tmp_path, LLAMA2_7B), str(tmp_path)
    common = {"model__path": path, "checkpoint__storage": f"{mount}/runs"}
    plain = sized(job_of(**common), mount=mount)
    job = job_of(**common, parallel__offload_optimizer="cpu")
    offloaded = sized(job, mount=mount)
    # fp32 weights, gradients and two moments of 1/16 of the parameters, with buffers, per worker.
    per_worker = FACTOR * 16 * SEVEN_BILLION / 16
    assert offloaded.memory_bytes - plain.memory_bytes == pytest.approx(8 * per_worker, abs=GIB)
    needed = host_memory(render(job, "bf16", "cuda"), parameter_count(LLAMA2_7B, job.method), 16)  # type: ignore[arg-type]
    assert needed.total == pytest.approx(per_worker, rel=1e-3)
    assert "6,738,415,616 parameters" in "".join(offloaded.notes)
    assert "(default)" in "".join(plain.notes)


def test_offloaded_activations_scale_with_layers_and_local_sequence_length(tmp_path: Path) -> None:
    path, mount = written(tmp_path, LLAMA2_7B), str(tmp_path)
    common = {
        "model__path": path, "checkpoint__storage": f"{mount}/runs", "data__max_length": 131072,
        "parallel__sequence_parallel_size": 8, "optim__global_batch_size": 2,
    }  # fmt: skip
    plain = sized(job_of(**common), mount=mount)
    moved = sized(job_of(**common, parallel__offload_activations="cpu"), mount=mount)
    assert moved.memory_bytes - plain.memory_bytes == 8 * (32 * 131072 // 8 * 4096 * 2)


def test_the_offload_volume_size_limit_covers_offloaded_state(tmp_path: Path) -> None:
    path, mount = written(tmp_path, LLAMA2_7B), str(tmp_path)
    job = job_of(
        model__path=path, checkpoint__storage=f"{mount}/runs", parallel__offload_optimizer="nvme",
        parallel__offload_path="/mnt/disk",
    )  # fmt: skip
    spec = workers_of(rayjob_of(job, mount=mount))["template"]["spec"]
    (volume,) = [item for item in spec["volumes"] if item["name"] == "offload"]
    count = parameter_count(LLAMA2_7B, job.method)
    assert count is not None
    needed = 8 * disk_bytes(render(job, "bf16", "cuda"), count, 16)
    bound = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * GIB
    assert needed <= bound < needed + GIB
    mounts = {item["name"]: item["mountPath"] for item in spec["containers"][0]["volumeMounts"]}
    assert mounts["offload"] == "/mnt/disk"


@pytest.mark.parametrize("config", [None, {"model_type": "gpt2"}])
def test_a_note_says_if_offloaded_state_cannot_be_computed(
    config: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = "meta-llama/Llama-2-7b-hf" if config is None else written(tmp_path, config)
    common = {"model__path": path, "checkpoint__storage": f"{tmp_path}/runs"}
    job = job_of(**common, parallel__offload_optimizer="cpu")
    text = manifest(job, PodOptions(mount=str(tmp_path)), "cuda")
    assert "NOT included" in text
    assert "--memory-per-node" in text
    assert (
        sized(job, mount=str(tmp_path)).memory_bytes
        == sized(job_of(**common), mount=str(tmp_path)).memory_bytes
    )


def test_options_override_computed_sizes() -> None:
    size = sized(job_of(), memory_per_node=300, cpus_per_node=32)
    assert (size.memory_bytes, size.cpus) == (300 * GIB, 32)
    assert "--memory-per-node" in size.notes[0]


REJECTED = {
    "uneven nodes": ({"parallel__workers": 6}, "cuda", {"gpus_per_node": 4}, ["--gpus-per-node=4", "[1, 2"]),
    "uneven pods": ({"parallel__workers": 6}, "cpu", {"nodes": 4}, ["--nodes=4", "[1, 2, 3, 6]"]),
    "more pods than workers": ({"parallel__workers": 2}, "cpu", {"nodes": 4}, ["--nodes=4", "[1, 2]"]),
    "GPUs on CPU": ({}, "cpu", {"gpus_per_node": 8}, ["--gpus-per-node=8", "--nodes"]),
    "nodes with GPUs": ({}, "cuda", {"nodes": 2}, ["--nodes=2", "--gpus-per-node"]),
    "zero memory": ({}, "cuda", {"memory_per_node": 0}, ["--memory-per-node=0", "below 1"]),
    "too few CPUs": ({"parallel__cpus_per_worker": 4}, "cuda", {"cpus_per_node": 16}, ["at least 32"]),
    "too little memory": ({}, "cuda", {"memory_per_node": 8}, ["--memory-per-node=8", "16 GiB of /dev/shm"]),
    "storage in a pod": ({"checkpoint__storage": "runs"}, "cuda", {}, ["storage=runs", "/mnt/shared"]),
    "storage elsewhere": ({"checkpoint__storage": "/scratch"}, "cuda", {}, ["/scratch", "--mount"]),
    "a local model": ({"model__path": "/models/a"}, "cuda", {}, ["model.path=/models/a", "/mnt/shared"]),
    "local data": ({"data__train": [{"path": "data/a.jsonl"}]}, "cuda", {}, ["path=data/a.jsonl", "URI"]),
    "a local folder": ({"data__train": [{"path": "orchestrator"}]}, "cuda", {}, ["data path=orchestrator"]),
    "a relative offload path": (
        {"parallel__offload_optimizer": "nvme", "parallel__offload_path": "disk"}, "cuda", {},
        ["parallel.offload_path=disk", "absolute"],
    ),
    "a port of Ray": ({"metrics": {"port": 8265}}, "cuda", {}, ["metrics.port=8265", "dashboard", "9400"]),
    "an invalid claim name": ({}, "cuda", {"claim": "My_Claim"}, ["--claim=My_Claim", "lower-case"]),
    "an invalid namespace": ({}, "cuda", {"namespace": "a.b"}, ["--namespace=a.b", "63"]),
    "a relative mount path": ({}, "cuda", {"mount": "shared"}, ["--mount=shared", "/mnt/shared"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_invalid_jobs_and_options_are_rejected(name: str) -> None:
    changes, device, options, parts = REJECTED[name]
    workers = changes.get("parallel__workers", 16)
    job = job_of(**{"optim__global_batch_size": workers, **changes})
    with pytest.raises(SpecError) as error:
        manifest(job, PodOptions(**options), device)  # type: ignore[arg-type]
    (problem,) = error.value.problems
    assert [part for part in parts if part not in problem] == []


def test_all_problems_are_reported_at_once() -> None:
    job = job_of(checkpoint__storage="runs", model__path="/models/a", metrics={"port": 8080})
    with pytest.raises(SpecError) as error:
        manifest(job, PodOptions(gpus_per_node=3), "cuda")
    assert len(error.value.problems) == 4


def test_a_note_says_if_sequence_parallel_groups_span_nodes() -> None:
    job = job_of(parallel__sequence_parallel_size=16, optim__global_batch_size=1)
    assert "sequence_parallel_size=16 does not divide the 8 workers" in manifest(job, PodOptions(), "cuda")
    assert "does not divide" not in manifest(job, PodOptions(gpus_per_node=16), "cuda")


@pytest.mark.process
def test_the_render_command_prints_manifests_and_errors(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(loader.dump(job_of()))
    arguments = ["render", "job.yaml", "--target", "rayjob", "--gpus-per-node"]
    done = orchestrator(*arguments, "4", "--image", "o:1", cwd=tmp_path)
    assert done.code == 0
    rayjob = list(yaml.safe_load_all(done.out))[1]
    assert workers_of(rayjob)["replicas"] == 4
    rejected = orchestrator(*arguments, "5", cwd=tmp_path)
    assert rejected.code == 2
    assert rejected.out == ""
    assert "--gpus-per-node=5" in rejected.err
    other = orchestrator("render", "job.yaml", "--gpus-per-node", "4", cwd=tmp_path)
    assert other.code == 2
    assert "--target rayjob" in other.err


@pytest.mark.parametrize(("port", "inside"), [("auto", 9400), (0, 9400), (9777, 9777), (None, None)])
def test_the_head_pod_declares_the_metrics_port(port: object, inside: int | None) -> None:
    text = manifest(job_of(metrics={"port": port}), PodOptions(), "cuda")
    config, rayjob = yaml.safe_load_all(text)
    assert loader.parse(config["data"]["job.yaml"]).metrics.port == inside
    ports = dict(pods(rayjob))["head"]["spec"]["containers"][0]["ports"]
    assert [item["containerPort"] for item in ports if item["name"] == "orch-metrics"] == [
        *([inside] if inside else [])
    ]
    assert ("was set to 9400" in text) == (port in ("auto", 0))


def test_environment_variables_come_from_a_secret() -> None:
    text = manifest(job_of(run={"env": {"HF_TOKEN": "hunter-2", "OTHER": None}}), PodOptions(), "cuda")
    assert "hunter-2" not in text
    assert "create secret generic run-env --from-literal=HF_TOKEN=... --from-literal=OTHER=..." in text
    _, rayjob = yaml.safe_load_all(text)
    assert problems_of(rayjob) == []
    by_pod = {
        name: [item for item in pod["spec"]["containers"][0]["env"] if "valueFrom" in item]
        for name, pod in pods(rayjob)
    }
    assert [item["name"] for item in by_pod.pop("head")] == ["HF_TOKEN", "OTHER"]
    assert not any(by_pod.values()), "workers get them from the driver"
