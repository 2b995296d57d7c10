"""Predicted host memory of a worker is its share of the node's memory by DeepSpeed's estimators."""

import json
from typing import Any

import pytest

from orchestrator.arch.parameters import ParameterCount
from orchestrator.config.loader import parse
from orchestrator.parallel.deepspeed_config import render
from orchestrator.planner.host_memory import HostMemory, disk_bytes, host_memory

SEVEN_BILLION = 7_000_000_000
WHOLE = ParameterCount(SEVEN_BILLION, SEVEN_BILLION)
ADAPTERS = ParameterCount(SEVEN_BILLION, 20_000_000)
OPTIMIZER_ON_CPU = {"offload_optimizer": "cpu"}
ALL_ON_CPU = {"offload_optimizer": "cpu", "offload_param": "cpu"}


OPTIMIZER_ON_DISK = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": "/disk"}
ALL_ON_DISK = {**OPTIMIZER_ON_DISK, "offload_param": "nvme"}


def rendered(parallel: dict[str, Any], workers: int, dtype: Any = "bf16") -> dict[str, Any]:
    section = json.dumps({"workers": workers, **parallel})
    job = parse(
        f"name: j\nmodel: {{path: m}}\ndata: {{train: [{{path: d}}]}}\nparallel: {section}\n"
        f"optim: {{global_batch_size: {workers}}}\n"
    )
    return render(job, dtype, "cuda")


def needed(
    parallel: dict[str, Any], workers: int, count: ParameterCount = WHOLE, dtype: Any = "bf16"
) -> HostMemory:
    return host_memory(rendered(parallel, workers, dtype), count, workers)


@pytest.mark.parametrize("workers", [1, 4, 8])
@pytest.mark.parametrize("everything", [False, True])
def test_zero3_agrees_with_deepspeed_for_a_node(workers: int, everything: bool) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    node, _, _ = estimate(SEVEN_BILLION, 0, workers, 1, cpu_offload=True, cpu_offload_params=everything)
    mine = needed({"zero_stage": 3, **(ALL_ON_CPU if everything else OPTIMIZER_ON_CPU)}, workers)
    assert mine.total * workers == pytest.approx(node, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_below_zero3_agrees_with_deepspeed_for_a_model_built_in_fp32(stage: int, workers: int) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

    node, _ = estimate(SEVEN_BILLION, workers, 1, cpu_offload=True)
    mine = needed({"zero_stage": stage, **OPTIMIZER_ON_CPU}, workers, dtype="fp32")
    assert mine.total * workers == pytest.approx(node, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_reserved_where_nothing_is_offloaded(stage: int) -> None:
    assert needed({"zero_stage": stage}, 2).total == 0


def test_frozen_parameters_have_no_state_but_are_held() -> None:
    optimizer_only = needed({"zero_stage": 3, **OPTIMIZER_ON_CPU}, 2, ADAPTERS)
    assert optimizer_only == HostMemory(optimizer=16 * 10_000_000)
    everything = needed({"zero_stage": 3, **ALL_ON_CPU}, 2, ADAPTERS)
    assert everything == HostMemory(optimizer=16 * 10_000_000, parameters=SEVEN_BILLION)
    assert everything.total == int(1.5 * (160_000_000 + SEVEN_BILLION))


def test_each_worker_builds_the_whole_model_below_zero3() -> None:
    adapters = needed({"zero_stage": 2, **OPTIMIZER_ON_CPU}, 2, ADAPTERS)
    assert adapters.building == 2 * SEVEN_BILLION
    assert adapters.total == int(1.5 * adapters.building)


def test_shares_are_rounded_up() -> None:
    assert needed({"zero_stage": 3, **OPTIMIZER_ON_CPU}, 3, ParameterCount(100, 100)).optimizer == 16 * 34


@pytest.mark.parametrize(("dtype", "weight_bytes"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_a_disk_holds_weights_and_state_gradients_and_moments_of_the_trained(
    dtype: str, weight_bytes: int
) -> None:
    def on_disk(parallel: dict[str, Any], count: ParameterCount) -> int:
        return disk_bytes(rendered(parallel, 3, dtype), count, 3)

    count = ParameterCount(100, 40)
    assert on_disk(OPTIMIZER_ON_DISK, count) == 16 * 14
    assert on_disk(ALL_ON_DISK, count) == 16 * 14 + weight_bytes * 34
    assert on_disk({**ALL_ON_DISK, "offload_optimizer": "cpu"}, count) == weight_bytes * 34
    assert on_disk({"zero_stage": 3, **ALL_ON_CPU}, count) == 0


def test_what_passes_through_memory_is_a_sub_group_that_its_last_weight_may_overfill() -> None:
    def through(largest: int) -> int:
        return needed(OPTIMIZER_ON_DISK, 2, ParameterCount(SEVEN_BILLION, SEVEN_BILLION, largest)).optimizer

    assert through(0) == 4 * 4 * 100_000_000
    assert through(500_000_000) == 4 * 4 * 350_000_000
    assert needed(OPTIMIZER_ON_DISK, 2, ParameterCount(100, 100, 50)).optimizer == 4 * 4 * 50


def test_parameters_on_a_disk_pass_through_buffers_to_and_fro() -> None:
    buffers = needed(ALL_ON_DISK, 2, ParameterCount(SEVEN_BILLION, SEVEN_BILLION, 20)).parameters
    assert buffers == 2 * (5 * 100_000_000 + 100_000_000 + 10)
