"""Admission predicts a job for the current cluster, writes plan.json, and rejects a job that cannot fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.topology import Node
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.model.build import load_config
from orchestrator.planner.calibration_store import recall
from orchestrator.planner.cpu_benchmark import CpuRates
from orchestrator.planner.estimate import CalibrationParams
from orchestrator.planner.plan import FIELDS
from orchestrator.run.recorder import Status
from orchestrator.run.report import predicted
from orchestrator.train import admission, ray_session

GIB = 2**30


def job(length: int = 512, model: str = "builtin/tiny-llama") -> JobSpec:
    return loader.parse(
        json.dumps(
            {
                "name": "planned",
                "model": {"path": model, "weights": "random"},
                "data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": length},
                "parallel": {"workers": 2, "zero_stage": 3, "device": "cpu"},
                "optim": {"global_batch_size": 4},
            }
        )
    )


@pytest.fixture(autouse=True)
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = tuple(
        Node(node_id=str(k), address=f"10.0.0.{k}", hostname=f"n{k}", cpus=1, gpus=0, memory_bytes=8 * GIB)
        for k in (1, 2)
    )
    monkeypatch.setattr(ray_session, "live_nodes", lambda: nodes)


@pytest.fixture
def kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CALIBRATION", str(tmp_path / "calibration.jsonl"))


def admit(spec: JobSpec, run_dir: Path, force: bool = False) -> admission.Admission | None:
    return admission.require_fit(spec, "cpu", load_config(spec.model), run_dir, force)


def test_what_fits_is_noted_and_kept_with_the_run(tmp_path: Path, logged: list[str]) -> None:
    admit(job(), tmp_path)
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["verdict"] == "fits"
    assert kept["machines"] == "2x1xcpu"
    assert kept["memory_capacity_bytes"] == pytest.approx(8 * GIB, rel=1e-6)
    assert kept["stack"].startswith("cpu between nodes, none full, torch ")
    assert logged[0].startswith("planned: fits: ")
    expected = predicted(tmp_path)
    assert expected is not None
    assert expected["memory_reserved_peak_bytes"] == kept["memory_reserved_peak_bytes"]
    assert set(kept["settings"]) == set(FIELDS)


def test_what_cannot_fit_is_refused_with_the_cheapest_changes(tmp_path: Path) -> None:
    with pytest.raises(ClusterError) as refused:
        admit(job(196_608), tmp_path)
    said = str(refused.value)
    assert "planned on 2x1xcpu does not fit: " in said
    assert "of 8.0" in said
    assert "(1) --set model.loss_tile_tokens=8192 (" in said
    assert "(2) " in said
    assert "--force" in said
    assert json.loads((tmp_path / "plan.json").read_text())["verdict"] == "does not fit"


def test_who_forces_it_is_told_and_goes_on(tmp_path: Path, logged: list[str]) -> None:
    admit(job(196_608), tmp_path, force=True)
    assert logged[0].startswith("planned, and forced: does not fit: ")


def test_nodes_that_do_not_say_what_they_offer_refuse_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    silent = Node(node_id="1", address="10.0.0.1", hostname="n1", cpus=2, gpus=0, memory_bytes=0)
    monkeypatch.setattr(ray_session, "live_nodes", lambda: (silent,))
    assert admit(job(4_194_304), tmp_path) is None
    assert logged == ["not planned: the nodes do not report their memory"]


def report(peak_bytes: float) -> dict[str, Any]:
    return {"memory_reserved_peak_bytes": peak_bytes, "medians": {"step_seconds": 1.5}}


@pytest.mark.process
@pytest.mark.usefixtures("kept_runs")
def test_what_runs_measure_calibrates_the_next_plan_of_their_stack(
    tmp_path: Path,
) -> None:
    first = admit(job(), tmp_path)
    assert first is not None
    before = predicted(tmp_path)
    assert before is not None
    assert not before["calibrated"]
    measured = before["memory_reserved_peak_bytes"] * 1.3
    for number in range(3):
        first.remember(tmp_path / str(number), report(measured))
    admit(job(), tmp_path)
    after = predicted(tmp_path)
    assert after is not None
    assert after["calibrated"]
    assert after["memory_reserved_peak_bytes"] == pytest.approx(measured, rel=0.05)


def made(run_dir: Path, attempt: int, step: int, seconds: float, held: float = 2 * GIB) -> None:
    row = {"attempt": attempt, "step": step, "step_seconds": seconds, "memory_reserved_peak_bytes": held}
    with (run_dir / "steps.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")


@pytest.mark.process
@pytest.mark.usefixtures("kept_runs")
def test_first_steps_are_measured_without_those_that_warm_up_and_calibrate(
    tmp_path: Path, logged: list[str]
) -> None:
    planned = admit(job(), tmp_path)
    assert planned is not None
    logged.clear()
    watch = admission.FirstStepsCheck(planned, tmp_path)
    made(tmp_path, 1, 11, 50.0)
    watch(Status(attempt=1, start=10, step=11))
    # A worker was killed: the next attempt is measured from its own start step.
    for step, seconds in enumerate((60.0, 40.0, 2.0, 2.0, 3.0, 2.0), 11):
        made(tmp_path, 2, step, seconds)
        watch(Status(attempt=2, start=10, step=step))
    assert logged == []
    assert recall(planned.stack) == []
    for step in (17, 18, 19):
        made(tmp_path, 2, step, 4.0 if step == 17 else 999.0)
        watch(Status(attempt=2, start=10, step=step))
    (note,) = logged
    assert note.startswith("the 5 steps after the first 2: 2 s a step, 2.00 GiB held (")
    (seen,) = recall(planned.stack)
    assert (seen.run, seen.seconds) == (str(tmp_path), 2.0)
    assert seen.peak_bytes == 2 * GIB
    planned.remember(tmp_path, report(3 * GIB))  # at the end of the run
    assert [each.peak_bytes for each in recall(planned.stack)] == [3 * GIB]


@pytest.mark.usefixtures("kept_runs")
def test_a_processor_has_a_predicted_time_once_its_steps_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "measure", lambda workers, threads: CpuRates(5e10, 8e9))
    first = admit(job(), tmp_path)
    assert first is not None
    before = predicted(tmp_path)
    assert before is not None
    assert before["step_seconds"] is None
    first.remember(tmp_path / "earlier", report(before["memory_reserved_peak_bytes"]))
    admit(job(), tmp_path)
    after = predicted(tmp_path)
    assert after is not None
    assert after["step_seconds"] == pytest.approx(1.5, rel=0.2)
    assert after["mfu"] is None


@pytest.mark.parametrize(("seconds", "is_slow"), [(1.0, False), (1.19, False), (1.21, True)])
def test_steps_slower_than_the_range_are_told_of(seconds: float, is_slow: bool) -> None:
    expected = {"step_seconds": 1.0, "memory_reserved_peak_bytes": GIB, "calibrated": True}
    said = admission.first_steps_text(5, seconds, GIB, expected)
    assert f"{seconds:.3g} s a step (1 predicted), 1.00 GiB held (1.00 predicted)" in said
    assert ("slower than the range" in said) == is_slow


def test_documents_that_were_read_replace_whole_packs(tmp_path: Path) -> None:
    first = admit(job(), tmp_path)
    assert first is not None
    packing = {"mean_square_tokens": 150.0, "labelled_share": 0.4, "largest_labelled_share": 0.8}
    whole = first.prediction(CalibrationParams())
    known = first.with_data(tmp_path, packing).prediction(CalibrationParams())
    assert (whole.work.attended_tokens, whole.work.labelled_share) == (512, 1.0)
    assert (known.work.attended_tokens, known.work.labelled_share) == (150, 0.4)
    assert known.memory.logits == pytest.approx(0.8 * whole.memory.logits)
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["memory_bytes_by_part"]["logits"] == round(known.memory.logits)


def test_rows_without_padding_take_the_time_of_their_mean_length(tmp_path: Path) -> None:
    own = job()
    unpadded = own.model_copy(update={"data": own.data.model_copy(update={"packing": "none"})})
    packing = {
        "mean_square_tokens": 150.0,
        "labelled_share": 0.9,
        "largest_labelled_share": 0.8,
        "slots": 12_800,
        "packs": 100,
    }
    for each, length in ((own, 512), (unpadded, 128)):
        first = admit(each, tmp_path)
        assert first is not None
        known = first.with_data(tmp_path, packing).prediction(CalibrationParams())
        assert known.work.length_tokens == 512
        assert known.work.at_mean_length().length_tokens == length


def test_a_family_that_is_not_known_is_not_planned_and_not_refused(tmp_path: Path, logged: list[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    admit(job(model=str(model)), tmp_path)
    assert logged == ["not planned: the architecture 'gpt2' is not supported"]
    assert predicted(tmp_path) is None
