"""Published metrics against values calculated by hand."""

import math
from dataclasses import fields

import pytest

from orchestrator.metrics.meter import (
    RankStep,
    RankSteps,
    eta_seconds,
    last_attempt,
    peaks,
    rank_columns,
    step_values,
)

STEP = RankStep(
    loss_sum=120.0,
    tokens=900.0,
    trained_tokens=60.0,
    slots=1000.0,
    flops_model=6e12,
    flops_hardware=8e12,
    data_seconds=0.1,
    forward_seconds=0.5,
    backward_seconds=1.0,
    optimizer_seconds=0.3,
    memory_bytes=10.0,
    memory_peak_bytes=30.0,
    memory_reserved_bytes=40.0,
    memory_reserved_peak_bytes=60.0,
    host_memory_peak_bytes=80.0,
)
SLOWER = RankStep(
    loss_sum=40.0,
    tokens=700.0,
    trained_tokens=20.0,
    slots=1000.0,
    flops_model=4e12,
    flops_hardware=5e12,
    data_seconds=0.2,
    forward_seconds=0.4,
    backward_seconds=1.1,
    optimizer_seconds=0.2,
    memory_bytes=20.0,
    memory_peak_bytes=25.0,
    memory_reserved_bytes=50.0,
    memory_reserved_peak_bytes=55.0,
    host_memory_peak_bytes=90.0,
)
IDLE = RankStep(0, 0, 0, 1000, 0, 0, 0.1, 0.1, 0.1, 0.1, 5, 6, 7, 8, 9)


def of_one(step: RankStep, seconds: float, peak_flops: float | None) -> dict[str, float]:
    """Return the metrics of a single rank."""
    columns = rank_columns(RankSteps.of([step]), seconds, peaks([peak_flops]))
    return {name: float(value) for name, (value,) in columns.items() if not math.isnan(value)}


def of_all(steps: list[RankStep], seconds: float, peak_flops: list[float | None]) -> dict[str, float]:
    return step_values(RankSteps.of(steps), seconds, peaks(peak_flops))


def test_one_rank() -> None:
    assert of_one(STEP, seconds=2.0, peak_flops=1e13) == pytest.approx(
        {
            "tgs": 450.0,
            "tgs_trained": 30.0,
            "tgs_slots": 500.0,
            "tokens": 900.0,
            "trained_tokens": 60.0,
            "data_seconds": 0.1,
            "forward_seconds": 0.5,
            "backward_seconds": 1.0,
            "optimizer_seconds": 0.3,
            "memory_bytes": 10.0,
            "memory_peak_bytes": 30.0,
            "memory_reserved_bytes": 40.0,
            "memory_reserved_peak_bytes": 60.0,
            "host_memory_peak_bytes": 80.0,
            "tflops_model": 3.0,
            "tflops_hardware": 4.0,
            "mfu": 0.3,
            "hfu": 0.4,
        }
    )


def test_all_ranks() -> None:
    assert of_all([STEP, SLOWER], seconds=2.0, peak_flops=[1e13, 1e13]) == pytest.approx(
        {
            "loss": 160.0 / 80.0,  # per token, not the mean of the means of ranks
            "step_seconds": 2.0,
            "padding_fraction": 0.2,
            "tgs": (450.0 + 350.0) / 2,
            "tgs_trained": (30.0 + 10.0) / 2,
            "tgs_slots": 500.0,
            "tflops_model": (3.0 + 2.0) / 2,
            "tflops_hardware": (4.0 + 2.5) / 2,
            "mfu": (0.3 + 0.2) / 2,
            "hfu": (0.4 + 0.25) / 2,
            "tokens": 1600.0,
            "trained_tokens": 80.0,
            "data_seconds": 0.2,
            "forward_seconds": 0.5,
            "backward_seconds": 1.1,
            "optimizer_seconds": 0.3,
            "memory_bytes": 20.0,
            "memory_peak_bytes": 30.0,
            "memory_reserved_bytes": 50.0,
            "memory_reserved_peak_bytes": 60.0,
            "host_memory_peak_bytes": 90.0,
        }
    )


def test_mfu_of_different_devices_uses_the_peak_of_each() -> None:
    assert of_all([STEP, SLOWER], 2.0, [1e13, 2e13])["mfu"] == pytest.approx((0.3 + 0.1) / 2)


def test_mfu_is_absent_for_an_unknown_peak() -> None:
    one = of_one(STEP, 2.0, None)
    assert "mfu" not in one
    assert "hfu" not in one
    assert one["tflops_model"] == 3.0
    every = of_all([STEP, SLOWER], 2.0, [1e13, None])
    assert "mfu" not in every
    assert "hfu" not in every
    assert every["tflops_model"] == 2.5


def test_flops_are_absent_for_an_unknown_architecture() -> None:
    unknown = RankStep(**{**vars(STEP), "flops_model": 0.0, "flops_hardware": 0.0})
    values = of_all([unknown, unknown], 2.0, [1e13, 1e13])
    assert {"tflops_model", "tflops_hardware", "mfu", "hfu"}.isdisjoint(values)
    assert values["tgs"] == 450.0


def test_a_rank_without_work_counts_as_zero_and_does_not_hide_other_ranks() -> None:
    values = of_all([STEP, IDLE], 2.0, [1e13, 1e13])
    assert values["tflops_model"] == pytest.approx(1.5)
    assert values["mfu"] == pytest.approx(0.15)
    assert values["tgs"] == pytest.approx(225.0)
    assert values["loss"] == pytest.approx(2.0)
    assert values["padding_fraction"] == pytest.approx(0.55)


def test_a_step_without_trained_tokens_has_zero_loss() -> None:
    assert of_all([IDLE], 2.0, [None])["loss"] == 0.0


def test_the_number_of_peaks_must_be_the_world_size() -> None:
    with pytest.raises(ValueError, match="2 ranks and 1 peaks"):
        of_all([STEP, SLOWER], 2.0, [None])


def test_ranks_keep_their_order() -> None:
    columns = rank_columns(RankSteps.of([STEP, SLOWER]), 2.0, peaks([1e13, None]))
    assert columns["tgs"].tolist() == [450.0, 350.0]
    assert columns["memory_peak_bytes"].tolist() == [30.0, 25.0]
    assert math.isnan(columns["mfu"][1])
    assert columns["mfu"][0] == pytest.approx(0.3)


def test_a_rank_without_work_has_no_flops() -> None:
    assert "tflops_model" not in of_one(IDLE, 2.0, 1e13)


def test_a_nan_loss_stays_nan() -> None:
    broken = RankStep(**{**vars(STEP), "loss_sum": math.nan})
    assert math.isnan(of_all([STEP, broken], 2.0, [None, None])["loss"])


def test_a_step_converts_to_a_vector_and_back() -> None:
    assert len(STEP.vector()) == len(fields(RankStep))
    both = RankSteps.of([STEP, SLOWER])
    assert list(both) == [STEP, SLOWER]
    assert len(both) == 2
    assert both.column("slots").tolist() == [1000.0, 1000.0]


@pytest.mark.parametrize(
    ("step", "steps", "recent", "expected"),
    [
        (0, 10, [], 0.0),
        (4, 10, [2.0], 12.0),
        (4, 10, [2.0, 100.0, 3.0], 18.0),  # the median ignores one slow step
        (10, 10, [2.0], 0.0),
    ],
)
def test_eta_seconds(step: int, steps: int, recent: list[float], expected: float) -> None:
    assert eta_seconds(step, steps, recent) == expected


def test_of_a_repeated_step_the_last_attempt_counts() -> None:
    rows = [
        {"step": 1, "attempt": 0, "loss": 5.0},
        {"step": 2, "attempt": 0, "loss": 4.0},
        {"step": 3, "attempt": 0, "loss": 3.0},
        {"step": 2, "attempt": 1, "loss": 4.1},
        {"step": 3, "attempt": 2, "loss": 3.2},
        {"step": 3, "attempt": 1, "loss": 3.1},
        {"step": 4, "attempt": 2, "loss": 2.0},
    ]
    assert [(row["step"], row["loss"]) for row in last_attempt(rows)] == [
        (1, 5.0),
        (2, 4.1),
        (3, 3.2),
        (4, 2.0),
    ]
    assert last_attempt([]) == []
