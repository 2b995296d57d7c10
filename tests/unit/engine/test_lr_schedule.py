"""Learning rates by hand: the warm-up, the three shapes, and their ends."""

from itertools import pairwise
from typing import Any

import pytest

from orchestrator.config.schema import OptimSpec
from orchestrator.engine.lr_schedule import learning_rate, replanned


def rates(steps: int, **options: Any) -> list[float]:
    optim = OptimSpec(lr=2.0, **options)
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_and_reaches_the_peak() -> None:
    found = rates(20, warmup_ratio=0.2, schedule="constant")
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == [2.0] * 16


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert rates(10, warmup_ratio=0.0, schedule=schedule)[0] == 2.0


def test_linear_falls_in_equal_parts() -> None:
    assert rates(4, warmup_ratio=0.0, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_falls_slowly_at_both_ends() -> None:
    found = rates(4, warmup_ratio=0.0, schedule="cosine")
    assert found == pytest.approx([2.0, 2.0 * 0.8535533905932737, 1.0, 2.0 * 0.14644660940672627])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_peak_it_only_falls_and_ends_near_nought(schedule: str) -> None:
    found = rates(1000, warmup_ratio=0.1, schedule=schedule)
    assert max(found) == found[99] == found[100] == 2.0
    assert all(before > after for before, after in pairwise(found[100:]))
    assert 0.0 < found[-1] < 0.01


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
def test_warm_up_is_its_share_of_the_steps_rounded_up(ratio: float, steps: int, warmup: int) -> None:
    found = rates(steps, warmup_ratio=ratio, schedule="constant")
    assert sum(rate < 2.0 for rate in found) == max(0, warmup - 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
def test_a_run_of_one_step_trains_at_the_peak(schedule: str, ratio: float) -> None:
    assert rates(1, warmup_ratio=ratio, schedule=schedule) == [2.0]


def test_the_rate_depends_on_the_step_alone_and_not_on_where_a_run_was_resumed() -> None:
    optim = OptimSpec(lr=2.0)
    assert learning_rate(optim, 7, 50) == rates(50)[7]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("constant", "by its schedule, the learning rate stays 1 in step 5"),
        (
            "linear",
            "by its linear schedule, which now ends there, the learning rate was 0.25 in step 4 and is 0.5 "
            "in step 5",
        ),
    ],
)
def test_other_steps_change_the_schedule_as_is_said(schedule: Any, words: str) -> None:
    optim = OptimSpec(lr=1.0, schedule=schedule, warmup_ratio=0.0)
    assert replanned(optim, optim, 4, 4, 8) == f"the run goes on from step 4 to step 8 in place of 4; {words}"
    assert replanned(optim, optim, 0, 4, 8) == "the run goes on from step 0 to step 8 in place of 4"
