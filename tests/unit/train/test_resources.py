"""Host memory for what is offloaded is reserved, and too little of it is refused before the start."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.arch.parameters import ParameterCount
from orchestrator.cluster.topology import Node
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, OptimSpec, ParallelSpec, SourceSpec
from orchestrator.errors import ClusterError
from orchestrator.parallel.deepspeed_config import render
from orchestrator.run.worker_config import Brief
from orchestrator.train import driver, resources

MILLION = 1_000_000
GIB = 2**30


def job(path: str = "m", **parallel: Any) -> JobSpec:
    section = {"workers": 2, "device": "cpu", "offload_optimizer": "cpu", **parallel}
    return JobSpec(
        name="j",
        model=ModelSpec(path=path, weights="random"),
        data=DataSpec(train=(SourceSpec(path="d"),), max_length=64),
        parallel=ParallelSpec(**section),
        optim=OptimSpec(global_batch_size=2),
    )


def offer(monkeypatch: pytest.MonkeyPatch, memory_bytes: int, free_bytes: int | None = None) -> None:
    """Let the cluster be a node with so much memory, of which so much is free."""
    node = Node("1", "10.0.0.1", "n1", 64.0, 0.0, memory_bytes)
    free = memory_bytes if free_bytes is None else free_bytes
    monkeypatch.setattr(resources.ray_session, "live_nodes", lambda: (node,))
    monkeypatch.setattr(resources.ray, "available_resources", lambda: {"CPU": 64.0, "memory": free})
    monkeypatch.setattr(resources, "_BUSY_WAIT_SECONDS", 0.0)


def reserved(spec: JobSpec, count: ParameterCount | None, said: list[str]) -> int:
    return resources.reserve_host_memory(spec, "cpu", render(spec, "fp32", "cpu"), count, said.append)


def test_what_is_needed_is_reserved_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, 24 * MILLION)
    said: list[str] = []
    assert reserved(job(), ParameterCount(MILLION, MILLION), said) == 12 * MILLION
    (sentence,) = said
    assert "1,000,000 parameters, 1,000,000 of them trained, offloaded by 2 workers" in sentence


def test_a_byte_too_few_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, 24 * MILLION - 1)
    with pytest.raises(ClusterError) as caught:
        reserved(job(), ParameterCount(MILLION, MILLION), [])
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 3
    assert problem.startswith("2 workers with 1 CPU, 0 GPUs and 0.01118 GiB of memory each cannot be placed")
    assert "10.0.0.1 has 64 CPUs, 0 GPUs and 0.02235 GiB of memory" in problem
    assert "start its Ray with --memory=BYTES" in problem
    assert "more parallel.workers hold less each" in problem


def test_memory_that_other_jobs_hold_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, 24 * MILLION, free_bytes=23 * MILLION)
    with pytest.raises(ClusterError, match=r"other jobs hold it \(memory: 0.02142 GiB free of 0.02235 GiB"):
        reserved(job(), ParameterCount(MILLION, MILLION), [])


def test_where_nothing_is_offloaded_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.ray_session, "live_nodes", lambda: pytest.fail("the cluster was asked"))
    said: list[str] = []
    assert reserved(job(offload_optimizer="none"), ParameterCount(MILLION, MILLION), said) == 0
    assert said == []


def test_a_model_that_cannot_be_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, 0)
    said: list[str] = []
    assert reserved(job(), None, said) == 0
    assert "no host memory is reserved" in said[0]


def test_the_driver_refuses_before_data_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, vocab_size=64, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    # Embedding and head 2 x 64 x 32, attention 4 x 32 x 32, MLP 3 x 32 x 32, three norms of 32.
    parameters = 4_096 + 4_096 + 3_072 + 96
    begun: list[str] = []
    monkeypatch.setattr(driver, "_prepare_data", lambda *_: begun.append("data"))
    monkeypatch.setattr(driver, "_fit", lambda *_: begun.append("workers"))
    offer(monkeypatch, 2 * int(1.5 * 16 * parameters / 2) - 1)
    with pytest.raises(ClusterError, match=f"the memory is for {parameters:,} parameters"):
        driver._train(job(str(tmp_path)), "cpu", tmp_path, None, (print, print), 0.0)  # type: ignore[arg-type]
    assert begun == []


def test_what_is_reserved_is_asked_of_ray_for_each_worker() -> None:
    brief = Brief(job(), Path("r"), Path("p"), None, "fp32", "cpu", {}, host_memory_bytes=12 * MILLION)
    assert brief.worker_resources == {"CPU": 1, "memory": 12 * MILLION}
    on_gpus = Brief(job(), Path("r"), Path("p"), None, "bf16", "cuda", {})
    assert on_gpus.worker_resources == {"CPU": 1, "GPU": 1}
