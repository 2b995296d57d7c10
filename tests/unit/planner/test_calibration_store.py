"""Measurements of runs are stored, read back, and improve later predictions for the same software stack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

from orchestrator.arch.registry import require_bundled
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config import loader
from orchestrator.planner.calibration_store import (
    Observation,
    cpu_rates,
    load_calibration,
    observed,
    recall,
    remember,
    software_stack_of,
)
from orchestrator.planner.cpu_benchmark import CpuRates
from orchestrator.planner.estimate import CalibrationParams, Prediction, predict
from orchestrator.planner.memory import GIB
from orchestrator.planner.search import predict_job
from orchestrator.planner.step_time import micro_steps

NODE = ClusterSpec.parse("8xA100-80G-SXM")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CALIBRATION", str(tmp_path / "folder" / "calibration.jsonl"))
    return tmp_path / "folder" / "calibration.jsonl"


def prediction(length: int = 4096, calibration: CalibrationParams = CalibrationParams()) -> Prediction:
    job = loader.parse(
        json.dumps(
            {
                "name": "planned",
                "model": {"path": "llama2-7b", "dtype": "bf16"},
                "data": {"train": [{"path": "rows.json"}], "max_length": length},
                "parallel": {"workers": 8},
            }
        )
    )
    return predict_job(job, require_bundled("llama2-7b"), NODE, calibration).prediction


def run(length: int, heavier_bytes: float = 0.0, slower: float = 1.0, name: str = "") -> Observation:
    plain = prediction(length)
    assert plain.time is not None
    report = {
        "memory_reserved_peak_bytes": plain.peak_bytes - plain.unallocated_bytes + heavier_bytes,
        "medians": {"step_seconds": plain.time.total * slower},
    }
    steps = micro_steps(plain.work, NODE.device)
    return observed(name or f"run-{length}", software_stack_of(plain.work, NODE), plain, steps, report)


def test_what_is_kept_is_read_again() -> None:
    kept = [run(2048), run(4096)]
    for each in kept:
        remember(each)
    assert recall(kept[0].stack) == kept
    assert recall("another stack") == []


def test_what_a_run_measures_later_replaces_its_first_steps() -> None:
    first, other, last = run(2048, slower=3.0), run(4096), run(2048)
    for each in (first, other, last):
        remember(each)
    assert recall(first.stack) == [other, last]


def test_a_run_is_not_predicted_from_itself() -> None:
    mine, other = run(2048, slower=3.0), run(4096, slower=1.4)
    remember(mine)
    assert load_calibration(mine.stack, mine.run) == CalibrationParams()
    remember(other)
    assert (
        load_calibration(mine.stack, mine.run).time.efficiency > load_calibration(mine.stack).time.efficiency
    )


def test_a_machine_that_cannot_be_measured_has_no_rates(place: Path) -> None:
    def measure(workers: int, threads: int) -> CpuRates:
        raise TimeoutExpired("probe", 60)

    assert cpu_rates(1, 1, measure) is None
    assert not place.exists()


def test_processors_are_measured_once_for_each_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def measure(workers: int, threads: int) -> CpuRates:
        asked.append((workers, threads))
        return CpuRates(1e10 / workers, 1e9)

    found = [cpu_rates(workers, 1, measure) for workers in (1, 2, 1, 2)]
    assert asked == [(1, 1), (2, 1)]
    assert found[2:] == [CpuRates(1e10, 1e9), CpuRates(5e9, 1e9)]
    assert recall(run(2048).stack) == []
    monkeypatch.setenv("ORCHESTRATOR_CALIBRATION", "")
    assert cpu_rates(1, 1, measure) is None


def test_runs_make_the_next_prediction_of_their_stack_better() -> None:
    stack = run(2048).stack
    assert load_calibration(stack) == CalibrationParams()
    for length in (1024, 2048, 4096):
        remember(run(length, heavier_bytes=4 * GIB, slower=1.4))
    found = load_calibration(stack)
    assert found.calibrated
    plain, better = prediction(8192), prediction(8192, found)
    assert plain.time is not None
    assert better.time is not None
    assert better.peak_bytes - plain.peak_bytes == pytest.approx(4 * GIB, rel=0.25)
    assert better.time.total / plain.time.total == pytest.approx(1.4, rel=0.1)
    assert better.calibrated


def test_a_stack_is_told_by_device_network_method_and_libraries() -> None:
    work = prediction().work
    names = {
        software_stack_of(work, NODE),
        software_stack_of(work, ClusterSpec.parse("8xL40S-48G")),
        software_stack_of(replace(work, world_size=16), NODE),
        software_stack_of(replace(work, method="lora"), NODE),
        software_stack_of(replace(work, method="lora", quantization="nf4"), NODE),
    }
    assert len(names) == 5
    assert all("torch 2." in name and "deepspeed 0." in name for name in names)


def test_lines_that_are_damaged_are_passed_over(place: Path) -> None:
    kept = run(2048)
    remember(kept)
    with place.open("a") as lines:
        lines.write("not JSON\n{}\n" + json.dumps({"stack": kept.stack}) + "\n")
    assert recall(kept.stack) == [kept]


def test_only_the_last_runs_of_a_stack_count() -> None:
    for number in range(41):
        remember(run(1024, name=f"run-{number}"))
    remember(run(2048))
    found = recall(run(1024).stack)
    assert len(found) == 40
    assert found[-1] == run(2048)


def test_nothing_is_kept_where_that_is_switched_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CALIBRATION", "")
    remember(run(2048))
    assert recall(run(2048).stack) == []
    assert not place.exists()


def test_a_place_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ORCHESTRATOR_CALIBRATION", str(tmp_path / "file" / "calibration.jsonl"))
    remember(run(2048))
    assert recall(run(2048).stack) == []


def test_predictions_without_constants_are_what_is_kept() -> None:
    """Otherwise each run would be fitted relative to the parameters of the previous one."""
    plain = prediction()
    assert run(4096).memory == plain.memory
    assert predict(plain.work, NODE).memory == plain.memory
