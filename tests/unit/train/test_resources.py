"""A job is resolved to device, dtype and worker resources, and rejected with too little host memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.topology import Node
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, OptimSpec, ParallelSpec, SourceSpec
from orchestrator.errors import ClusterError
from orchestrator.run.resolve import resolve
from orchestrator.train import driver, resources


def job(path: str = "m", **parallel: Any) -> JobSpec:
    section = {"workers": 2, "device": "cpu", "offload_optimizer": "cpu", **parallel}
    return JobSpec(
        name="j",
        model=ModelSpec(path=path, weights="random"),
        data=DataSpec(train=(SourceSpec(path="d"),), max_length=64),
        parallel=ParallelSpec(**section),
        optim=OptimSpec(global_batch_size=2),
    )


def node(memory_bytes: int) -> Node:
    return Node("1", "10.0.0.1", "n1", 64.0, 0.0, memory_bytes)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return a folder with the config.json of a model with 11,392 parameters."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, vocab_size=64, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


# Embedding and head 2 x 64 x 32, attention 4 x 32 x 32, MLP 3 x 32 x 32, three norms of 32.
PARAMETERS = 4_096 + 4_096 + 3_072 + 96
NEEDED = int(1.5 * 16 * PARAMETERS / 2)  # bytes per worker: 16 per parameter over 2 workers, plus 50 %


def test_host_memory_for_offload_is_part_of_the_worker_resources(model: str) -> None:
    resolved = resolve(job(model), [node(2 * NEEDED)])
    assert resolved.worker_resources == {"CPU": 1, "memory": NEEDED}
    (sentence,) = driver._host_memory_notes(resolved)
    assert f"{PARAMETERS:,} parameters, {PARAMETERS:,} of them trained, offloaded by 2 workers" in sentence


def test_a_byte_too_few_is_refused(model: str) -> None:
    with pytest.raises(ClusterError) as caught:
        resolve(job(model), [node(2 * NEEDED - 1)])
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 3
    assert problem.startswith("2 workers with 1 CPU, 0 GPUs and")
    assert "of memory each cannot be placed" in problem
    assert "start its Ray with --memory=BYTES" in problem
    assert f"the memory is for {PARAMETERS:,} parameters" in problem
    assert "raise parallel.workers" in problem


def test_memory_that_other_jobs_use_is_waited_for_and_then_refused(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(job(model), [node(2 * NEEDED)])
    monkeypatch.setattr(resources.ray, "available_resources", lambda: {"CPU": 64.0, "memory": NEEDED})
    monkeypatch.setattr(resources, "_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(ClusterError, match=r"other jobs are using them \(memory: .* GiB free of .* needed\)"):
        resources.wait_for_resources(resolved)


def test_without_offload_no_memory_is_reserved(model: str) -> None:
    resolved = resolve(job(model, offload_optimizer="none"), [node(0)])
    assert resolved.worker_resources == {"CPU": 1}
    assert driver._host_memory_notes(resolved) == []


def test_a_model_that_cannot_be_counted_reserves_nothing_and_says_so(model: str) -> None:
    counted = resolve(job(model), [node(2 * NEEDED)])
    resolved = replace(counted, parameter_count=None, host_memory=None)
    (sentence,) = driver._host_memory_notes(resolved)
    assert "no host memory is reserved" in sentence


def test_the_driver_refuses_before_data_and_workers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(driver, "prepare_data", lambda *_: begun.append("data"))
    monkeypatch.setattr(driver, "fit", lambda *_: begun.append("workers"))
    monkeypatch.setattr(driver.ray_session, "live_nodes", lambda: (node(2 * NEEDED - 1),))
    with pytest.raises(ClusterError, match=f"the memory is for {PARAMETERS:,} parameters"):
        driver._train(job(model), start_of(Path(model)))
    assert begun == []


def start_of(folder: Path) -> driver._Start:
    return driver._Start(folder, None, lambda _: None, None, False, 0.0)  # type: ignore[arg-type]


def test_a_gpu_is_reserved_for_each_worker_on_cuda(model: str) -> None:
    gpus = Node("1", "10.0.0.1", "n1", 64.0, 8.0, 0)
    resolved = resolve(job(model, device="auto", offload_optimizer="none"), [gpus])
    assert (resolved.device, resolved.dtype) == ("cuda", "bf16")
    assert resolved.worker_resources == {"CPU": 1, "GPU": 1}
