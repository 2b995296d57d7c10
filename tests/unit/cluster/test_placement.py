"""Placement counts resources per node and suggests a remedy if a worker group does not fit."""

import pytest

from orchestrator.cluster.placement import capacity, placement_problem
from orchestrator.cluster.topology import Node


def node(number: int, cpus: float, gpus: float, alive: bool = True) -> Node:
    return Node(f"id{number}", f"10.0.0.{number}", f"n{number}", cpus, gpus, 2**30, alive)


def test_a_group_that_fits_has_no_problem() -> None:
    assert (
        placement_problem([node(1, 8, 2), node(2, 8, 2)], workers=4, cpus_per_worker=4, gpus_per_worker=1)
        is None
    )


def test_a_worker_cannot_span_nodes() -> None:
    nodes = [node(1, 8, 1), node(2, 8, 1)]
    assert capacity(nodes, 1, 2) == 0
    sentence = placement_problem(nodes, workers=1, cpus_per_worker=1, gpus_per_worker=2)
    assert sentence == (
        "1 worker with 1 CPU and 2 GPUs each cannot be placed, since a worker cannot span nodes:"
        " 10.0.0.1 has 8 CPUs and 1 GPU; 10.0.0.2 has 8 CPUs and 1 GPU;"
        " request less per worker or add larger nodes"
    )


def test_resources_are_counted_per_node_not_in_total() -> None:
    # 6 CPUs in total, but each node fits one worker with 2 CPUs.
    sentence = placement_problem(
        [node(1, 3, 0), node(2, 3, 0)], workers=3, cpus_per_worker=2, gpus_per_worker=0
    )
    assert sentence is not None
    assert "3 workers with 2 CPUs and 0 GPUs each" in sentence
    assert sentence.endswith("set parallel.workers to at most 2 or add nodes")


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"), [(1, 1, 2), (1, 0, 8), (0, 1, 2), (5, 1, 1), (0.5, 0.5, 4)]
)
def test_the_scarcest_resource_limits_capacity(cpus: float, gpus: float, expected: int) -> None:
    assert capacity([node(1, 8, 2)], cpus, gpus) == expected


def test_fractional_resources_are_not_lost_to_rounding() -> None:
    assert capacity([node(1, 0.3, 0)], 0.1, 0) == 3
    assert capacity([node(1, 8, 0.7)], 0, 0.1) == 7


GIB = 2**30


@pytest.mark.parametrize(("memory", "expected"), [(0, 8), (GIB, 1), (GIB // 2, 2), (GIB + 1, 0)])
def test_memory_limits_capacity_if_workers_reserve_it(memory: int, expected: int) -> None:
    assert capacity([node(1, 8, 2)], 1, 0, memory) == expected


def test_a_lack_of_memory_lists_the_memory_of_every_node() -> None:
    sentence = placement_problem([node(1, 8, 2), node(2, 4, 1)], 3, 1, 1, memory_per_worker=3 * GIB // 4)
    assert sentence == (
        "3 workers with 1 CPU, 1 GPU and 0.75 GiB of memory each cannot be placed, since a worker cannot span"
        " nodes: 10.0.0.1 has 8 CPUs, 2 GPUs and 1 GiB of memory; 10.0.0.2 has 4 CPUs, 1 GPU and 1 GiB of"
        " memory; use nodes with more memory, or more nodes; if a node has more memory than Ray reports,"
        " start its Ray with --memory=BYTES"
    )
    assert placement_problem([node(1, 8, 2), node(2, 4, 1)], 2, 1, 1, memory_per_worker=3 * GIB // 4) is None


def test_a_lack_of_cpus_is_not_attributed_to_memory() -> None:
    sentence = placement_problem([node(1, 2, 0)], 3, 1, 0, memory_per_worker=GIB // 2)
    assert sentence is not None
    assert sentence.endswith("set parallel.workers to at most 2 or add nodes")


def test_dead_nodes_are_ignored_and_named() -> None:
    sentence = placement_problem([node(1, 4, 1), node(2, 4, 1, alive=False)], 2, 1, 1)
    assert sentence is not None
    assert "10.0.0.2 is dead" in sentence
    assert "at most 1" in sentence


def test_no_nodes() -> None:
    sentence = placement_problem([], 1, 1, 0)
    assert sentence is not None
    assert "there are no nodes" in sentence


def test_a_group_without_workers_is_rejected() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        placement_problem([node(1, 4, 0)], 0, 1, 0)


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0), (-1, 1), (1, -1)])
def test_a_worker_must_request_a_resource(cpus: float, gpus: float) -> None:
    with pytest.raises(ValueError, match="at least one above 0"):
        capacity([node(1, 4, 4)], cpus, gpus)
