"""Predicted step time by component matches manual calculations."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.arch.flops import (
    FrozenWeights,
    Recomputation,
    forward_flops,
    hardware_flops,
    model_flops,
    squares_in_window,
)
from orchestrator.arch.registry import require_bundled
from orchestrator.cluster.hardware import AchievedTflops, Device, device
from orchestrator.planner.calibration import fit_time, predicted_seconds
from orchestrator.planner.host_memory import Offload
from orchestrator.planner.step_time import (
    LINEAR_EFFICIENCY,
    MissingDeviceRates,
    StepTime,
    TimeParams,
    micro_steps,
    step_time,
    tokens_per_gpu_second,
)
from orchestrator.planner.workload import Model, Workload
from orchestrator.planner.workload_flops import attention_flops, linear_flops, micro_batch_model_flops

A100 = device("A100-80G-SXM")


def model_of(name: str) -> Model:
    found = Model.from_config(require_bundled(name))
    assert found is not None
    return found


LLAMA = model_of("llama2-7b")
FULL = Workload(LLAMA, length_tokens=4096, world_size=8, zero_stage=3)


def seconds(gpu: Device = A100, **changes: Any) -> StepTime:
    return step_time(replace(FULL, **changes), gpu)


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "bloom-7b1"])
@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("labelled", [1024, 256])
def test_flops_are_those_of_the_canon(name: str, checkpointing: Any, method: Any, labelled: int) -> None:
    model = model_of(name)
    work = Workload(
        model, length_tokens=1024, method=method, checkpointing=checkpointing, rank=8, zero_stage=3,
        labelled_share=labelled / 1024,
    )  # fmt: skip
    forward = forward_flops(
        model.shape, 1024, 1024.0**2, labelled, num_adapter_params=work.num_adapter_params
    )
    frozen = FrozenWeights(layers=method == "lora", head=method == "lora")
    canon = hardware_flops(forward, Recomputation(checkpointing, 3), frozen)
    passes = 4 if checkpointing == "full" else 3
    assert linear_flops(work) + passes * attention_flops(work) == pytest.approx(canon, rel=1e-6)


@pytest.mark.parametrize("name", ["mistral-7b", "qwen2.5-7b", "gemma2-9b"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("document", [512, 6144, 8192])
def test_planner_and_metrics_count_the_same_model_flops(name: str, method: Any, document: int) -> None:
    """Metrics sum over documents; the planner has their mean squared length and the labelled fraction."""
    model, tokens, scored = model_of(name), 24576, 6144
    lengths = [document] * (tokens // document)
    forward = forward_flops(
        model.shape,
        tokens,
        sum(length**2 for length in lengths),
        scored,
        squares_in_window(lengths, model.shape.window),
    )
    frozen = FrozenWeights(layers=method == "lora", head=method == "lora")
    work = Workload(
        model, length_tokens=tokens, method=method, rank=0, labelled_share=scored / tokens,
        mean_square_tokens=float(document), checkpointing="full",
    )  # fmt: skip
    assert micro_batch_model_flops(work) == pytest.approx(model_flops(forward, frozen), rel=1e-12)


def test_linear_flops_of_a_recomputed_step_written_out() -> None:
    """Llama 2 7B: four passes over 32 layers of 202,375,168 weights, and three of the LM head."""
    weights = 4 * 32 * 202_375_168 + 3 * 4096 * 32000
    assert linear_flops(FULL) == pytest.approx(2 * 4096 * weights, rel=1e-15)


def test_products_take_their_flops_over_a_part_of_what_the_best_one_reaches() -> None:
    ideal = linear_flops(FULL) / 267.9e12
    assert seconds().linear == pytest.approx(ideal / LINEAR_EFFICIENCY * (1 + 128 / 4096))


def test_kernels_reach_another_part_of_the_peak_on_another_device() -> None:
    """From A100 to H100, matmuls scale nearly with the peak, and the same attention kernels far less."""
    here, there = step_time(FULL, A100), step_time(FULL, device("H100-80G-SXM"))
    assert here.linear / there.linear == pytest.approx(794.5 / 267.9)
    assert here.attention / there.attention == pytest.approx(335 / 204)


def test_where_nobody_measured_it_the_shares_of_an_a100_are_taken() -> None:
    plain = A100.model_copy(update={"achieved_tflops": AchievedTflops()})
    known, assumed = step_time(FULL, A100), step_time(FULL, plain)
    assert assumed.linear == pytest.approx(known.linear, rel=1e-3)
    assert assumed.attention == pytest.approx(known.attention, rel=1e-3)


def test_parts_add_up_and_accumulation_repeats_them() -> None:
    once, thrice = seconds(), seconds(gradient_accumulation_steps=3)
    assert once.total == pytest.approx(sum(once.by_part().values()))
    assert thrice.linear == pytest.approx(3 * once.linear)
    assert thrice.optimizer == once.optimizer
    assert once.busy < once.total


def test_documents_make_attention_cheap() -> None:
    whole, packed = seconds(length_tokens=65536), seconds(length_tokens=65536, mean_square_tokens=512.0)
    assert packed.attention == pytest.approx(whole.attention / 128)
    assert packed.linear == whole.linear


def test_short_work_waits_for_launches_and_long_work_does_not() -> None:
    short, long = seconds(length_tokens=64), seconds(length_tokens=65536)
    assert short.launch > short.busy
    assert long.launch < 1e-3 * long.busy


def test_shared_sequences_exchange_inside_nodes_and_between_them() -> None:
    assert seconds().ulysses == 0
    inside = seconds(length_tokens=65536, sequence_parallel_size=8)
    assert inside.ulysses > 0
    assert inside.network == 0
    across = seconds(length_tokens=65536, sequence_parallel_size=16, world_size=16)
    assert across.network > across.ulysses > 0


def test_zero_1_and_2_move_less_than_zero_3() -> None:
    moved = [seconds(length_tokens=65536, zero_stage=stage).zero for stage in (1, 2, 3)]
    assert moved[0] == moved[1] < moved[2]
    many = [
        seconds(length_tokens=65536, zero_stage=stage, gradient_accumulation_steps=4).zero for stage in (1, 2)
    ]
    assert many[0] == pytest.approx(many[1] / 4)


def test_offloaded_states_cost_a_step_on_the_host_and_copies() -> None:
    here, there = seconds(), seconds(offload=Offload("cpu"))
    assert here.offload == 0
    assert there.optimizer == 0
    assert there.offload > 32 * LLAMA.parameters.total / 40e9
    short = seconds(length_tokens=64, offload=Offload("cpu", "cpu"))
    assert short.fetch > 0  # too little computation to hide the copies


def test_quantised_weights_cost_their_making() -> None:
    lora = replace(FULL, method="lora", zero_stage=0, world_size=1)
    plain, gptq = (step_time(replace(lora, quantization=kind), A100) for kind in ("none", "gptq-int4"))
    assert plain.dequantization == 0
    weights = 32 * LLAMA.parameters.matrices_per_layer
    assert gptq.dequantization == pytest.approx(3 * 20 * weights / 2039e9)


def test_tgs_is_a_gpus_own_tokens() -> None:
    work = replace(FULL, sequence_parallel_size=4, gradient_accumulation_steps=4)
    assert tokens_per_gpu_second(work, 2.0) == 4 * 1024 / 2.0


def test_a_device_without_a_peak_is_named() -> None:
    with pytest.raises(MissingDeviceRates, match=r"no bf16 peak .* for device cpu.*--catalogue"):
        step_time(FULL, device("cpu"))


@pytest.mark.parametrize("planted", [TimeParams(0.8), TimeParams(1.1, 2.0), TimeParams(0.9, 0.7)])
def test_planted_constants_are_found(planted: TimeParams) -> None:
    steps = [micro_steps(replace(FULL, length_tokens=2**power), A100) for power in range(6, 15)]
    rows = [(predicted_seconds(each, False), each.step(planted).total) for each in steps]
    found = fit_time(rows, False)
    assert found.efficiency == pytest.approx(planted.efficiency, rel=0.03)
    assert found.launch_factor == pytest.approx(planted.launch_factor, rel=0.15)
    assert found.network_factor == 1.0


def test_the_network_is_found_where_workers_span_nodes() -> None:
    planted = TimeParams(0.9, 1.0, 8.0)
    lengths = [2**power for power in range(10, 17)]
    steps = [micro_steps(replace(FULL, length_tokens=size, world_size=32), A100) for size in lengths]
    found = fit_time([(predicted_seconds(each, True), each.step(planted).total) for each in steps], True)
    assert found.efficiency == pytest.approx(0.9, rel=0.05)
    assert found.network_factor == pytest.approx(8.0, rel=0.25)
    assert found.launch_factor == 1.0


def test_nothing_measured_leaves_time_as_it_is() -> None:
    assert fit_time([], False).efficiency == pytest.approx(1.0)
    assert fit_time([], True).network_factor == pytest.approx(1.0)
