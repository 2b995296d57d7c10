"""A job is planned for a cluster before it is submitted, from what the dashboard says of its nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.submit.remote_planning import Unplanned, machines_there, require_fit

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
    """Answers as Ray's does."""

    def __init__(self, nodes: list[dict[str, Any]], gpus: list[list[str]] = []) -> None:
        self.nodes, self.gpus = nodes, gpus

    def __call__(self, path: str) -> Any:
        if path.startswith("/api/v0/nodes?"):
            return {"result": True, "data": {"result": {"total": len(self.nodes), "result": self.nodes}}}
        assert path == "/nodes?view=summary"
        named = [{"gpus": [{"name": name, "memoryTotal": 81920} for name in each]} for each in self.gpus]
        return {"result": True, "data": {"summary": named}}


def node(k: int, state: str = "ALIVE", **resources: float) -> dict[str, Any]:
    return {"node_id": str(k), "node_ip": f"10.0.0.{k}", "state": state, "resources_total": resources}


A100 = "NVIDIA A100-SXM4-80GB"
TWO_NODES = [node(k, CPU=64, GPU=8, memory=900 * GIB) for k in (1, 2)]
GPUS = Dashboard([node(0, CPU=8, memory=8 * GIB), *TWO_NODES], [[], [A100] * 8, [A100] * 8])
PROCESSORS = Dashboard([node(k, CPU=2, memory=4 * GIB) for k in (1, 2)])


def test_gpus_are_those_that_the_dashboard_names() -> None:
    assert str(machines_there(job(), GPUS)) == "2x8xA100-80G-SXM"
    few = job(workers=4)
    assert str(machines_there(few, GPUS)) == "1x4xA100-80G-SXM"
    mixed = Dashboard(TWO_NODES, [[A100] * 8, ["NVIDIA A100-SXM4-40GB"] * 8])
    assert str(machines_there(job(), mixed)) == "2x8xA100-40G-SXM", "the smaller one decides"


def test_nodes_that_are_dead_do_not_count() -> None:
    gone = Dashboard([node(9, "DEAD"), node(1, CPU=16, memory=64 * GIB)])
    found = machines_there(job(device="cpu"), gone)
    assert str(found) == "1x16xcpu"
    assert found.device.memory_bytes == 4 * GIB


def test_what_fits_is_told_and_what_does_not_is_refused_with_changes() -> None:
    notes: list[str] = []
    require_fit(job(), GPUS, False, notes.append)
    assert notes[0].startswith("planned for 2x8xA100-80G-SXM: fits: ")
    with pytest.raises(ClusterError) as refused:
        require_fit(job(262_144), GPUS, False, notes.append)
    assert "planned on 2x8xA100-80G-SXM does not fit: " in str(refused.value)
    assert "(1) --set " in str(refused.value)
    require_fit(job(262_144), GPUS, True, notes.append)
    assert notes[1].startswith("planned, and forced for 2x8xA100-80G-SXM: does not fit: ")
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("asked", "dashboard", "words"),
    [
        (job(model="/models/on/the/cluster"), GPUS, "model.path=/models/on/the/cluster is no folder"),
        (job(), Dashboard(TWO_NODES, [["NVIDIA H100 NVL"] * 8]), "does not know NVIDIA H100 NVL"),
        (job(), Dashboard(TWO_NODES), "needs the name of a GPU"),
        (job(), lambda path: {"result": False, "msg": "no"}, "does not list its nodes"),
        (job(), Dashboard([]), "no node offers what a worker takes"),
        (job(), Dashboard([node(1, CPU=2)]), "no node offers what a worker takes"),
    ],
)
def test_what_cannot_be_planned_from_here_is_said_and_left_to_the_cluster(
    asked: JobSpec, dashboard: Any, words: str
) -> None:
    notes: list[str] = []
    require_fit(asked, dashboard, False, notes.append)
    (note,) = notes
    assert note.startswith("not planned from here, but by train on the cluster: ")
    assert words in note


def test_a_dashboard_that_cannot_be_reached_is_left_to_what_submits() -> None:
    def silent(path: str) -> Any:
        raise ConnectionError(path)

    with pytest.raises(Unplanned):
        machines_there(job(), silent)


def test_processors_have_the_memory_that_each_worker_finds() -> None:
    small = job(512, "builtin/tiny-llama", workers=4, device="cpu")
    notes: list[str] = []
    require_fit(small, PROCESSORS, False, notes.append)
    assert notes[0].startswith("planned for 2x2xcpu: fits: ")
