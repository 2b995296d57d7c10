"""Totals of a run whose number of workers has changed."""

from __future__ import annotations

import pytest

from orchestrator.run.report import _totals


def step(attempt: int, seconds: float, tokens: float, slots: float, workers: int) -> dict[str, float]:
    """Return a row of steps.jsonl; rates are those of one worker."""
    rates = {"tgs": tokens, "tgs_slots": slots}
    per_worker = {name: value / seconds / workers for name, value in rates.items()}
    return {
        "attempt": attempt,
        "step_seconds": seconds,
        "tokens": tokens,
        "trained_tokens": 1.0,
        **per_worker,
    }


def test_rates_are_per_worker_whatever_the_number_of_workers_was() -> None:
    steps = [step(1, 4.0, 600.0, 800.0, workers=1), step(2, 2.0, 700.0, 800.0, workers=2)]
    totals = _totals(steps, {1: 1, 2: 2})
    worker_seconds = 4.0 * 1 + 2.0 * 2
    assert totals["tgs"] == pytest.approx(1300.0 / worker_seconds)
    assert totals["padding_fraction"] == pytest.approx(1 - 1300 / 1600)
    assert (totals["step_seconds"], totals["tokens"], totals["trained_tokens"]) == (6.0, 1300.0, 2.0)


def test_an_attempt_whose_line_is_lost_counts_as_the_last_one() -> None:
    steps = [step(1, 2.0, 700.0, 800.0, workers=2), step(2, 2.0, 700.0, 800.0, workers=2)]
    assert _totals(steps, {2: 2})["padding_fraction"] == pytest.approx(1 - 1400 / 1600)
