"""Sequence parallelism that does not divide the attention heads is rejected before training."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster.topology import Node
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, OptimSpec, ParallelSpec, SourceSpec
from orchestrator.errors import SpecError
from orchestrator.run.resolve import ResolvedJob, _require_divisible_heads
from orchestrator.train import driver


def notes_of(monkeypatch: pytest.MonkeyPatch, size: int, gpus: list[int]) -> list[str]:
    """Return the notes for a model with 32 heads and 8 KV heads.

    Args:
        monkeypatch: Replaces the list of nodes.
        size: Workers, and sequence-parallel size.
        gpus: Number of GPUs of every node.
    """
    config: Any = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8)
    nodes = [Node(str(n), f"10.0.0.{n}", f"n{n}", 64.0, float(count), 0) for n, count in enumerate(gpus)]
    monkeypatch.setattr(driver.ray_session, "live_nodes", lambda: tuple(nodes))
    job = JobSpec(
        name="j",
        model=ModelSpec(path="m"),
        data=DataSpec(train=(SourceSpec(path="d"),), max_length=2048),
        parallel=ParallelSpec(workers=size, sequence_parallel_size=size),
        optim=OptimSpec(global_batch_size=1),
    )
    _require_divisible_heads(job, config)
    resolved = ResolvedJob(job, "cuda", "bf16", config, None, {}, None, 0)
    return driver._sequence_parallel_notes(resolved)


@pytest.mark.parametrize(("size", "gpus"), [(1, [3, 5]), (8, [8, 8]), (4, [8, 8]), (2, [2]), (16, [16])])
def test_sequences_that_stay_inside_nodes_need_no_word(
    monkeypatch: pytest.MonkeyPatch, size: int, gpus: list[int]
) -> None:
    assert notes_of(monkeypatch, size, gpus) == []


@pytest.mark.parametrize(("size", "gpus"), [(16, [8, 8]), (8, [12, 12]), (4, [8, 6])])
def test_sequences_that_cross_nodes_are_said_to(
    monkeypatch: pytest.MonkeyPatch, size: int, gpus: list[int]
) -> None:
    (sentence,) = notes_of(monkeypatch, size, gpus)
    assert f"sequence_parallel_size={size} does not divide" in sentence


def test_a_degree_that_the_heads_do_not_allow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="sequence_parallel_size=3 does not fit num_attention_heads=32"):
        notes_of(monkeypatch, 3, [3])
