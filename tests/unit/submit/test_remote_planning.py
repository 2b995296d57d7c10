"""A job is planned before submission from the nodes listed by the dashboard."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.submit.remote_planning import PlanningUnavailable, cluster_from_dashboard, require_fit

GIB = 2**30


def job(length: int = 4096, model: str = "llama2-7b", **parallel: Any) -> JobSpec:
    return loader.parse(
        json.dumps(
            {
                "name": "planned",
                "model": {"path": model, "weights": "random"},
                "data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": length},
                "parallel": {"workers": 16, "zero_stage": 3, **parallel},
                "optim": {"global_batch_size": 16},
            }
        )
    )


class Dashboard:
    """Mock of Ray's dashboard."""

    def __init__(self, nodes: list[dict[str, Any]], gpus: list[list[str]] = []) -> None:
        self.nodes, self.gpus = nodes, gpus

    def __call__(self, path: str) -> Any:
        if path.startswith("/api/v0/nodes?"):
            return {"result": True, "data": {"result": {"total": len(self.nodes), "result": self.nodes}}}
        assert path == "/nodes?view=summary"
        named = [{"gpus": [{"name": name, "memoryTotal": 81920} for name in names]} for names in self.gpus]
        return {"result": True, "data": {"summary": named}}


def node(k: int, state: str = "ALIVE", **resources: float) -> dict[str, Any]:
    return {"node_id": str(k), "node_ip": f"10.0.0.{k}", "state": state, "resources_total": resources}


A100 = "NVIDIA A100-SXM4-80GB"
TWO_NODES = [node(k, CPU=64, GPU=8, memory=900 * GIB) for k in (1, 2)]
GPU_NODES = Dashboard([node(0, CPU=8, memory=8 * GIB), *TWO_NODES], [[], [A100] * 8, [A100] * 8])
CPU_NODES = Dashboard([node(k, CPU=2, memory=4 * GIB) for k in (1, 2)])


def test_gpu_models_come_from_the_dashboard() -> None:
    assert str(cluster_from_dashboard(job(), GPU_NODES)) == "2x8xA100-80G-SXM"
    few = job(workers=4)
    assert str(cluster_from_dashboard(few, GPU_NODES)) == "1x4xA100-80G-SXM"
    mixed = Dashboard(TWO_NODES, [[A100] * 8, ["NVIDIA A100-SXM4-40GB"] * 8])
    assert str(cluster_from_dashboard(job(), mixed)) == "2x8xA100-40G-SXM", "the GPU with less memory counts"


def test_dead_nodes_are_ignored() -> None:
    gone = Dashboard([node(9, "DEAD"), node(1, CPU=16, memory=64 * GIB)])
    cluster = cluster_from_dashboard(job(device="cpu"), gone)
    assert str(cluster) == "1x16xcpu"
    assert cluster.device.memory_bytes == 4 * GIB


def test_a_job_that_fits_is_noted_and_one_that_does_not_is_rejected_with_suggestions(
    logged: list[str],
) -> None:
    require_fit(job(), GPU_NODES, False)
    assert logged[0].startswith("planned for 2x8xA100-80G-SXM: fits: ")
    with pytest.raises(ClusterError) as error:
        require_fit(job(262_144), GPU_NODES, False)
    assert "planned on 2x8xA100-80G-SXM does not fit: " in str(error.value)
    assert "(1) --set " in str(error.value)
    require_fit(job(262_144), GPU_NODES, True)
    assert logged[1].startswith("planned, and forced for 2x8xA100-80G-SXM: does not fit: ")
    assert len(logged) == 2


@pytest.mark.parametrize(
    ("spec", "dashboard", "words"),
    [
        (job(model="/models/on/the/cluster"), GPU_NODES, "model.path=/models/on/the/cluster is not a folder"),
        (
            job(),
            Dashboard(TWO_NODES, [["NVIDIA H100 NVL"] * 8]),
            "NVIDIA H100 NVL is not in the hardware catalogue",
        ),
        (job(), Dashboard(TWO_NODES), "lists no GPU name"),
        (job(), lambda path: {"result": False, "msg": "no"}, "does not list its nodes"),
        (job(), Dashboard([]), "no node has enough resources for a worker"),
        (job(), Dashboard([node(1, CPU=2)]), "no node has enough resources for a worker"),
    ],
)
def test_a_job_that_cannot_be_planned_locally_is_planned_on_the_cluster(
    spec: JobSpec, dashboard: Any, words: str, logged: list[str]
) -> None:
    require_fit(spec, dashboard, False)
    (note,) = logged
    assert note.startswith("not planned locally, train plans it on the cluster: ")
    assert words in note


def test_an_unreachable_dashboard_makes_planning_unavailable() -> None:
    def silent(path: str) -> Any:
        raise ConnectionError(path)

    with pytest.raises(PlanningUnavailable):
        cluster_from_dashboard(job(), silent)


def test_cpu_workers_share_the_memory_of_their_node(logged: list[str]) -> None:
    small = job(512, "builtin/tiny-llama", workers=4, device="cpu")
    require_fit(small, CPU_NODES, False)
    assert logged[0].startswith("planned for 2x2xcpu: fits: ")
