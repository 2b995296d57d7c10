"""The metrics that a run reports agree with measurements by an outside process."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Observed, step_rows

pytestmark = pytest.mark.ray


@pytest.mark.alone
def test_tgs_of_the_report_agrees_with_tokens_over_wall_time(undisturbed_run: Observed) -> None:
    report = undisturbed_run.report
    first_seen: dict[int, float] = {}
    for moment, step in undisturbed_run.polls:
        first_seen.setdefault(step, moment)
    wall = first_seen[12] - first_seen[0]
    tokens = sum(row["tokens"] for row in step_rows(undisturbed_run.folder))
    assert report["tgs"] == pytest.approx(tokens / wall / 2, rel=0.02)


def test_every_step_has_every_promised_field(undisturbed_run: Observed) -> None:
    promised = {
        "step", "epoch", "loss", "gradient_norm", "learning_rate", "tgs", "tgs_trained", "tgs_slots",
        "tflops_model", "tflops_hardware", "step_seconds", "data_seconds", "forward_seconds",
        "backward_seconds", "optimizer_seconds", "tokens", "trained_tokens", "padding_fraction",
        "memory_peak_bytes", "attempt",
    }  # fmt: skip
    rows = step_rows(undisturbed_run.folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert promised <= row.keys()
        assert row["tgs_trained"] < row["tgs"] <= row["tgs_slots"]
        assert row["tflops_model"] < row["tflops_hardware"]
        slowest = max(row[f"{phase}_seconds"] for phase in ("data", "forward", "backward", "optimizer"))
        assert 0 < slowest < row["step_seconds"]
        assert "mfu" not in row, "the peak of a CPU is not known, so MFU is absent and not guessed"


def test_first_steps_are_told_of_and_the_whole_run_calibrates(undisturbed_run: Observed) -> None:
    assert "the 5 steps after the first 2: " in undisturbed_run.said
    kept = undisturbed_run.folder.parents[1] / "calibration.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    runs = [line for line in lines if "run" in line]
    assert [line["run"] for line in runs] == [str(undisturbed_run.folder)] * 2
    assert runs[-1]["seconds"] == undisturbed_run.report["medians"]["step_seconds"]
    rows = step_rows(undisturbed_run.folder)[2:]
    assert min(row["step_seconds"] for row in rows) <= runs[0]["seconds"]
    assert runs[0]["seconds"] <= max(row["step_seconds"] for row in rows)
    assert [line["workers"] for line in lines if "cpu_host" in line] == [2]
