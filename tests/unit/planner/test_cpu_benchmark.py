"""The CPU benchmark yields a device with measured rates for predictions."""

from __future__ import annotations

import pytest

from orchestrator.planner.cpu_benchmark import cpu_device, measure


@pytest.mark.process
def test_processors_become_a_device_with_all_that_a_prediction_needs() -> None:
    rates = measure(1)
    found = cpu_device(4.0, rates)
    assert found.is_cpu
    assert found.memory_bytes == 4 * 2**30
    assert found.peak_flops("fp32") == pytest.approx(rates.flops, rel=1e-12)  # stored in TFLOP/s
    assert rates.flops > 1e8
    assert found.peak_flops("bf16") is None
    assert (found.memory_bandwidth_gb_per_second or 0) > 0.1


def test_without_rates_only_its_memory_is_known() -> None:
    found = cpu_device(4.0)
    assert found.memory_bytes == 4 * 2**30
    assert found.peak_flops("fp32") is None
