"""Predicted memory by component matches manual calculations and DeepSpeed's estimators."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.arch.parameters import ParameterCount
from orchestrator.arch.registry import require_bundled
from orchestrator.config.loader import parse
from orchestrator.parallel.deepspeed_config import render, size_nvme_buffers
from orchestrator.planner.estimate import workload_from_job
from orchestrator.planner.host_memory import host_memory
from orchestrator.planner.memory import (
    GIB,
    GpuMemory,
    gpu_memory,
    host_memory_of_workload,
    kept_bytes,
    loss_bytes,
    weight_bytes,
)
from orchestrator.planner.workload import DataShape, Model, Workload

P = 6_738_415_616
EMBEDDING = 32_000 * 4096


def model_of(name: str) -> Model:
    found = Model.from_config(require_bundled(name))
    assert found is not None
    return found


LLAMA = model_of("llama2-7b")
FULL = Workload(LLAMA, length_tokens=2048)


def gpu(**changes: Any) -> GpuMemory:
    return gpu_memory(replace(FULL, **changes), context_bytes=0.0)


def test_mixed_precision_is_sixteen_bytes_a_parameter() -> None:
    found = gpu()
    assert (found.weights, found.gradients, found.optimizer) == (2 * P, 2 * P, 12 * P)
    assert found.states == 16 * P
    assert found.step == 4 * P  # fp32 gradients in the optimizer step


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"), [(1, 2 * P, 2 * P), (2, 2 * P, 2 * P / 8), (3, 2 * P / 8, 2 * P / 8)]
)
def test_zero_partitions_what_its_stage_says(stage: int, weights: float, gradients: float) -> None:
    found = gpu(zero_stage=stage, world_size=8)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, 12 * P / 8)


def test_zero_3_gathers_and_the_others_do_not() -> None:
    assert gpu(zero_stage=2, world_size=8).gathered_params == 0
    assert gpu(zero_stage=3, world_size=8).gathered_params == 2 * (1_000_000_000 + 50_000_000 + EMBEDDING)


def test_without_fp32_copies_it_is_eight_bytes_and_an_update() -> None:
    found = gpu(master_weights=False)
    assert found.states == 8 * P
    assert found.step == 2 * P


def test_fp32_has_no_copies() -> None:
    assert gpu(element_bytes=4).states == 16 * P


def test_zero_copies_its_partition_of_fp32_weights_too() -> None:
    alone, shared = gpu(element_bytes=4), gpu(element_bytes=4, zero_stage=1, world_size=8)
    assert alone.optimizer == 8 * P
    assert shared.optimizer == 12 * P / 8


OFFLOADED = [
    ("cpu", "none", 2), ("cpu", "none", 3), ("cpu", "cpu", 3), ("nvme", "none", 3), ("nvme", "nvme", 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("optimizer", "param", "stage"), OFFLOADED)
def test_a_plan_counts_the_host_memory_that_workers_reserve(
    optimizer: Any, param: Any, stage: int, dtype: Any
) -> None:
    job = parse(
        f"name: j\nmodel: {{path: m, dtype: {dtype}}}\ndata: {{train: [{{path: d}}], max_length: 2048}}\n"
        f"parallel: {{workers: 8, zero_stage: {stage}, offload_optimizer: {optimizer}, "
        f"offload_param: {param}, offload_path: {'/disk' if 'nvme' in (optimizer, param) else 'null'}}}\n"
    )
    work = workload_from_job(job, require_bundled("llama2-7b"), LLAMA, 8, "cuda")
    ds_config = render(job, dtype, "cuda")
    size_nvme_buffers(ds_config, EMBEDDING // 8)
    assert host_memory_of_workload(work) == host_memory(ds_config, ParameterCount(P, P, EMBEDDING), 8)
    moved = gpu_memory(work)
    assert moved.optimizer == moved.gradients == moved.step == 0
    assert (moved.weights == 0) == (param != "none")


def test_activations_by_hand() -> None:
    assert kept_bytes(FULL) == 2 * 4096 * 32 * 2048
    assert kept_bytes(replace(FULL, micro_batch_size=3)) == 3 * kept_bytes(FULL)
    assert kept_bytes(replace(FULL, sequence_parallel_size=4)) == kept_bytes(FULL) / 4
    token = 18 * 4096 + 4 * 4096 + 8 * 4096 + 8 * 11008 + 4 * 32
    assert kept_bytes(replace(FULL, checkpointing="none")) == 32 * 2048 * token
    assert gpu().layer == 2048 * token


def test_logits_are_those_of_the_pack_that_has_most_labels() -> None:
    whole = loss_bytes(FULL)
    few = DataShape(document_tokens=300.0, labelled_share=0.3, largest_labelled_share=0.5)
    assert loss_bytes(FULL.with_data(few, whole_packs=False)) == whole / 2
    shared = replace(FULL, sequence_parallel_size=2)
    assert loss_bytes(shared.with_data(few, False)) == loss_bytes(shared), "one of both may have all of them"
    tiled = replace(FULL, loss_tile_tokens=512).with_data(few, False)
    hidden = 2 * 2 * 4096 * 2048
    assert loss_bytes(tiled) == whole / 4 + hidden
    assert FULL.with_data(few, whole_packs=True).attended_tokens == 2048


def test_the_longest_row_takes_memory_and_the_mean_row_time() -> None:
    known = replace(FULL, sequence_parallel_size=4).with_data(DataShape(pack_tokens=300.4), whole_packs=False)
    assert loss_bytes(known) == loss_bytes(replace(FULL, sequence_parallel_size=4))
    assert known.at_mean_length().length_tokens == 300
    assert known.at_mean_length().at_mean_length() == known.at_mean_length()
    assert FULL.at_mean_length() == FULL
    short = replace(known, mean_length_tokens=1.5)
    assert short.at_mean_length().tokens == 1, "every worker has a token"


def test_offloaded_activations_are_on_the_host() -> None:
    moved = replace(FULL, offload_activations=True)
    assert host_memory_of_workload(moved).activations == kept_bytes(FULL)
    assert kept_bytes(moved) == kept_bytes(FULL) * 2 / 32


def test_eager_attention_pays_for_squares() -> None:
    flash, eager = gpu(), gpu(flash=False)
    assert eager.layer - flash.layer == 17 * 32 * 2048**2
    shared = gpu(flash=False, sequence_parallel_size=4)  # scores: a quarter of the heads, the whole row
    assert shared.layer == eager.layer / 4
    kept = gpu(flash=False, checkpointing="none").activations - gpu(checkpointing="none").activations
    assert kept == 32 * 3 * 32 * 2048**2


def test_checkpointing_keeps_less_the_more_it_recomputes() -> None:
    full, selective, none = (
        kept_bytes(replace(FULL, checkpointing=kind)) for kind in ("full", "selective", "none")
    )
    assert full < selective < none


def test_tiles_bound_what_they_tile() -> None:
    assert loss_bytes(FULL) == 14 * 32_000 * 2048
    assert loss_bytes(replace(FULL, loss_tile_tokens=256)) == 14 * 32_000 * 256 + 4 * 4096 * 2048
    saved = gpu().layer - gpu(mlp_tile_tokens=512).layer
    assert saved == pytest.approx(0.75 * 2048 * 8 * 11008)


@pytest.mark.parametrize(
    ("quantization", "bits", "rest"),
    [("nf4", 4.127, 4), ("int8", 8.08, 4), ("gptq-int4", 4.16, 2), ("gptq-int8", 8.16, 2)],
)
def test_quantised_weights_are_their_bits_and_the_rest(quantization: str, bits: float, rest: int) -> None:
    matrices = 32 * LLAMA.parameters.matrices_per_layer
    work = replace(
        FULL, method="lora", quantization=quantization, rank=1, targets=("q_proj",), adapter_bytes=4
    )
    adapters = 4 * 32 * 2 * 4096
    assert weight_bytes(work) == pytest.approx(matrices * bits / 8 + rest * (P - matrices) + adapters)


def test_adapters_are_all_that_has_states() -> None:
    work = replace(FULL, method="lora", rank=8, targets=("q_proj", "v_proj"))
    assert work.num_adapter_params == work.num_trainable_params == 32 * 2 * 8 * 8192
    found = gpu_memory(work, 0.0)
    assert found.states == 2 * P + 16 * work.num_adapter_params
    more = replace(work, train_embeddings=True)
    assert more.num_trainable_params - work.num_trainable_params == 2 * EMBEDDING


def test_the_peak_is_the_largest_of_three_moments() -> None:
    short, long = gpu(length_tokens=64), gpu(length_tokens=65536)
    assert short.required == short.step_peak > short.loss_peak
    assert long.required == max(long.loss_peak, long.backward_peak) > long.step_peak
    assert short.peak >= short.required
    assert sum(short.by_part().values()) > short.required  # the parts do not peak at the same time


def test_lengths_that_vary_waste_activations() -> None:
    even, varied = gpu(length_tokens=65536), gpu(length_tokens=65536, length_variation=1.0)
    assert varied.required == even.required
    assert varied.peak - even.peak == pytest.approx(0.75 * (even.activations + max(even.logits, even.layer)))


def test_context_is_on_top() -> None:
    assert gpu_memory(FULL).required - gpu().required == pytest.approx(0.6 * GIB)
    assert gpu_memory(replace(FULL, world_size=2)).context == pytest.approx(1.6 * GIB)
