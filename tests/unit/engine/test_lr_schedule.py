"""Learning rates computed by hand: warmup, the three schedules, and their ends."""

from itertools import pairwise
from typing import Any

import pytest

from orchestrator.config.schema import OptimSpec
from orchestrator.engine.lr_schedule import learning_rate, schedule_change_message


def rates(steps: int, **options: Any) -> list[float]:
    optim = OptimSpec(lr=2.0, **options)
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    actual = rates(20, warmup_ratio=0.2, lr_scheduler="constant")
    assert actual[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert actual[4:] == [2.0] * 16


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert rates(10, warmup_ratio=0.0, lr_scheduler=schedule)[0] == 2.0


def test_linear_decays_in_equal_steps() -> None:
    assert rates(4, warmup_ratio=0.0, lr_scheduler="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_decays_slowly_at_both_ends() -> None:
    actual = rates(4, warmup_ratio=0.0, lr_scheduler="cosine")
    assert actual == pytest.approx([2.0, 2.0 * 0.8535533905932737, 1.0, 2.0 * 0.14644660940672627])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_peak_it_only_decays_and_ends_near_zero(schedule: str) -> None:
    actual = rates(1000, warmup_ratio=0.1, lr_scheduler=schedule)

    assert max(actual) == actual[99] == actual[100] == 2.0
    assert all(before > after for before, after in pairwise(actual[100:]))
    assert 0.0 < actual[-1] < 0.01


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"),
    [
        (0.03, 100, 3),
        (0.03, 101, 4),
        (0.07, 100, 7),
        (0.01, 20, 1),
        (0.0, 20, 0),
        (1.0, 20, 20),
        (0.29, 100, 29),
    ],
)
def test_warmup_steps_are_rounded_up(ratio: float, steps: int, warmup: int) -> None:
    actual = rates(steps, warmup_ratio=ratio, lr_scheduler="constant")
    assert sum(rate < 2.0 for rate in actual) == max(0, warmup - 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
def test_a_run_of_one_step_uses_the_peak(schedule: str, ratio: float) -> None:
    assert rates(1, warmup_ratio=ratio, lr_scheduler=schedule) == [2.0]


def test_the_learning_rate_depends_on_the_step_alone() -> None:
    optim = OptimSpec(lr=2.0)
    assert learning_rate(optim, 7, 50) == rates(50)[7]


@pytest.mark.parametrize(
    ("schedule", "change"),
    [
        ("constant", "by its schedule, the learning rate stays 1 in step 5"),
        (
            "linear",
            "by its linear schedule, which now ends there, the learning rate was 0.25 in step 4 and is 0.5 "
            "in step 5",
        ),
    ],
)
def test_a_message_describes_the_schedule_of_another_number_of_steps(schedule: Any, change: str) -> None:
    optim = OptimSpec(lr=1.0, lr_scheduler=schedule, warmup_ratio=0.0)
    resumed = "the run resumes from step 4 and trains to step 8 instead of 4"
    assert schedule_change_message(optim, optim, 4, 4, 8) == f"{resumed}; {change}"
    assert schedule_change_message(optim, optim, 0, 4, 8) == resumed.replace("from step 4", "from step 0")
