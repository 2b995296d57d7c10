"""Calibration recovers known parameters of a stack, and stays near the prior with few measurements."""

import random
from dataclasses import replace

import pytest

from orchestrator.arch.registry import require_bundled
from orchestrator.planner.calibration import MemoryParams, fit_memory, verdict
from orchestrator.planner.memory import GIB, GpuMemory, gpu_memory
from orchestrator.planner.workload import Model, Workload

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def rows_of() -> list[GpuMemory]:
    model = Model.from_config(require_bundled("qwen-7b"))
    assert model is not None
    lora = Workload(model, length_tokens=256, method="lora")
    return [gpu_memory(replace(lora, length_tokens=length)) for length in LENGTHS]


def test_nothing_measured_leaves_predictions_as_they_are() -> None:
    none = fit_memory([])
    assert none == MemoryParams()
    for memory in rows_of():
        assert none.peak(memory) == pytest.approx(memory.peak)
        assert none.required(memory) == pytest.approx(memory.required)


@pytest.mark.parametrize(
    "planted", [MemoryParams(2 * GIB, 1.0), MemoryParams(0.0, 1.1), MemoryParams(-GIB, 0.9)]
)
def test_planted_constants_are_found(planted: MemoryParams) -> None:
    found = fit_memory([(memory, planted.peak(memory)) for memory in rows_of()])
    assert found.activation_factor == pytest.approx(planted.activation_factor, rel=0.03)
    assert found.offset_bytes == pytest.approx(planted.offset_bytes, abs=0.3 * GIB)


def test_one_odd_row_decides_little() -> None:
    generator = random.Random(0)
    rows = [(memory, memory.peak * generator.uniform(0.99, 1.01)) for memory in rows_of()]
    odd = [*rows, (rows[0][0], rows[0][1] * 2)]
    memory = rows[3][0]
    assert fit_memory(odd).peak(memory) == pytest.approx(fit_memory(rows).peak(memory), rel=0.05)


def test_one_row_moves_the_constants_towards_it_and_no_further() -> None:
    memory = rows_of()[0]
    found = fit_memory([(memory, memory.peak + GIB)])
    assert memory.peak < found.peak(memory) <= memory.peak + GIB


def test_runs_that_formulas_do_not_describe_move_the_offset_a_few_gib_at_most() -> None:
    rows = rows_of()
    found = fit_memory([(memory, 0.2 * memory.peak) for memory in rows])
    assert found.offset_bytes == -6 * GIB
    assert fit_memory([(memory, memory.peak + 40 * GIB) for memory in rows]).offset_bytes == 6 * GIB


def test_verdicts_leave_a_margin() -> None:
    assert verdict(70 * GIB, 80 * GIB) == "fits"
    assert verdict(75 * GIB, 80 * GIB) == "tight"
    assert verdict(81 * GIB, 80 * GIB) == "tight"
    assert verdict(82 * GIB, 80 * GIB) == "does not fit"
