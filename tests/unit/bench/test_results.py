"""Results are appended per cell: a killed sweep loses no measurement and repeats none."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import report, results, runner
from orchestrator.bench.results import Reading, Row
from orchestrator.bench.sweep import Cell, Sweep, load
from orchestrator.errors import ClusterError, SpecError
from tests.unit.bench.rows import row, without_figures

SWEEP = """\
name: s
job: {name: j, model: {path: m}, data: {train: [{path: d}]}}
matrix: {data.max_length: [64, 128, 256]}
warmup_steps: 1
steps: 2
"""


def step(number: int, attempt: int = 1, **values: float) -> str:
    return json.dumps({"step": number, "attempt": attempt, "step_seconds": 1.0, "tgs": 10.0, **values}) + "\n"


def test_a_reading_is_median_and_quartiles() -> None:
    assert Reading.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Reading(3.0, 2.0, 4.0, 5)
    assert Reading.of([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(1 / 3)
    assert Reading.of([7.0]) == Reading(7.0, 7.0, 7.0, 1)


def test_warm_up_is_left_out_and_a_step_done_again_counts_once(tmp_path: Path) -> None:
    lines = [step(1, tgs=1.0), step(2, tgs=2.0), step(3, tgs=3.0), step(3, attempt=2, tgs=4.0), '{"step": 4']
    (tmp_path / "steps.jsonl").write_text("".join(lines))
    assert results.samples_of(tmp_path, 1) == {"tgs": [2.0, 4.0], "step_seconds": [1.0, 1.0]}
    assert results.samples_of(tmp_path, 3) == {}
    assert results.samples_of(tmp_path / "none", 0) == {}


def test_the_peak_is_that_of_the_whole_run(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text(step(1, memory_peak_bytes=9.0) + step(2, memory_peak_bytes=8.0))
    assert results.peaks_of(tmp_path) == {"memory_peak_bytes": 9.0}


def test_rows_come_back_equal_and_a_line_cut_short_costs_only_itself(tmp_path: Path) -> None:
    first, second = row("a", {"optim.lr": 0.5}), without_figures("out_of_memory", "b")
    results.append(tmp_path, first)
    with (tmp_path / results.RESULTS).open("a") as file:
        file.write('{"cell": "b", "fie')
    results.append(tmp_path, second)
    assert results.read(tmp_path) == [first, second]


def test_of_a_cell_that_was_run_again_the_last_row_counts(tmp_path: Path) -> None:
    results.append(tmp_path, without_figures("failed", "a"))
    results.append(tmp_path, row("a"))
    assert [each.status for each in results.read(tmp_path)] == ["ok"]


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / results.RESULTS).write_text('{"cell": "a", "colour": "red"}\n')
    with pytest.raises(SpecError, match="another version"):
        results.read(tmp_path)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "sweep.yaml").write_text(SWEEP + f"storage: {tmp_path / 'bench'}\n")
    return load(tmp_path / "sweep.yaml")


class Machine:
    """A fake of cell processes: records which cells ran and returns the configured status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run: list[int] = []
        self.statuses: dict[int, str] = {}
        self.killed_at: int | None = None
        monkeypatch.setattr(runner, "_measure", self.measure)

    def measure(self, sweep: Sweep, cell: Cell, address: str | None, lock: int) -> Row:
        length = cell.job.data.max_length
        if length == self.killed_at:
            raise KeyboardInterrupt
        self.run.append(length)
        status: Any = self.statuses.get(length, "ok")
        fields = dict(cell.fields)
        return row(cell.name, fields) if status == "ok" else without_figures(status, cell.name, fields)


def test_a_sweep_goes_on_after_cells_that_do_not_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.statuses = {64: "out_of_memory", 128: "failed"}
    told: list[str] = []
    rows = runner.run_cells(sweep, None, told.append)
    assert [each.status for each in rows] == ["out_of_memory", "failed", "ok"]
    assert told[1] == "[1/3] max_length=64: out of memory (the reason)"
    assert told[3] == "[2/3] max_length=128: failed: the reason"
    assert told[5] == "[3/3] max_length=256: TGS 100.0 ±7.5%, step 2.000 s over 3 steps, 3,072 MiB"


def test_a_killed_sweep_goes_on_with_the_cells_that_have_no_row(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    machine.statuses, machine.killed_at = {64: "out_of_memory"}, 128
    with pytest.raises(KeyboardInterrupt):
        runner.run_cells(sweep, None, lambda line: None)
    assert [each.status for each in report.load(sweep.folder)[1]] == ["out_of_memory"], "a table half-way"
    machine.killed_at, machine.run = None, []
    rows = runner.run_cells(sweep, None, lambda line: None)
    assert machine.run == [128, 256]
    assert [each.fields["data.max_length"] for each in rows] == [64, 128, 256]


def test_only_what_failed_is_tried_again_and_only_when_asked(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    machine.statuses = {64: "out_of_memory", 128: "failed"}
    runner.run_cells(sweep, None, lambda line: None)
    machine.statuses, machine.run = {}, []
    runner.run_cells(sweep, None, lambda line: None)
    assert machine.run == []
    rows = runner.run_cells(sweep, None, lambda line: None, retry_failed=True)
    assert machine.run == [128]
    assert [each.status for each in rows] == ["out_of_memory", "ok", "ok"]


def test_the_report_is_of_the_cells_that_the_sweep_has_now(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    runner.run_cells(sweep, None, lambda line: None)
    text = (tmp_path / "sweep.yaml").read_text().replace("[64, 128, 256]", "[256, 64]")
    (tmp_path / "sweep.yaml").write_text(text)
    fewer = load(tmp_path / "sweep.yaml")
    runner.run_cells(fewer, None, lambda line: None)
    table, rows = report.load(fewer.folder)
    assert [each.fields["data.max_length"] for each in rows] == [256, 64]
    files = {path.name for path in report.write(fewer.folder, plots=False)}
    assert files == {"table.md", "table.csv", "table.json"}
    assert (fewer.folder / "table.csv").read_text() == table.csv()


def test_a_layout_that_is_not_known_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    runner.run_cells(sweep, None, lambda line: None)
    assert report.load(sweep.folder, "xtuner")[0].columns[0].header == "Model"
    with pytest.raises(SpecError, match="--layout html is not one of the layouts known; use plain, xtuner"):
        report.load(sweep.folder, "html")


def test_a_cell_whose_process_dies_is_a_row(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_run_process", lambda *arguments: "its driver was ended by signal 9")
    rows = runner.run_cells(sweep, None, lambda line: None)
    assert {(each.status, each.reason) for each in rows} == {("failed", "its driver was ended by signal 9")}


def test_a_run_shorter_than_its_warm_up_is_not_a_figure(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(run_dir: Path, minutes: float | None, lock: int) -> str:
        (run_dir / "steps.jsonl").write_text(step(1))
        (run_dir / "outcome.json").write_text('{"status": "ok", "reason": null}')
        return ""

    monkeypatch.setattr(runner, "_run_process", one_step)
    rows = runner.run_cells(sweep, None, lambda line: None)
    assert {each.status for each in rows} == {"failed"}
    assert "the run has 1 steps and warmup_steps=1 leaves none" in str(rows[0].reason)


def test_two_sweeps_do_not_write_one_folder(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    monkeypatch.setattr(runner, "_SECONDS_TO_STOP", 0.0)
    sweep.folder.mkdir(parents=True)
    with (sweep.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ClusterError, match="another sweep is at work"):
            runner.run_cells(sweep, None, lambda line: None)
    assert len(runner.run_cells(sweep, None, lambda line: None)) == 3


def test_a_storage_that_cannot_be_written_is_named(sweep: Sweep) -> None:
    sweep.folder.parent.write_text("a file, and no folder")
    with pytest.raises(ClusterError, match="cannot be written"):
        runner.run_cells(sweep, None, lambda line: None)


def test_a_cell_whose_machines_failed_is_tried_once_more(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def no_ray(run_dir: Path, minutes: float | None, lock: int) -> str:
        tries.append(run_dir.name)
        outcome: dict[str, Any] = {"status": "failed", "reason": "no Ray", "machines": True}
        if len(tries) == 2:
            outcome = {"status": "out_of_memory", "reason": "too large"}
        (run_dir / "outcome.json").write_text(json.dumps(outcome))
        return ""

    monkeypatch.setattr(runner, "_run_process", no_ray)
    rows = runner.run_cells(sweep, None, lambda line: None)
    assert [each.reason for each in rows] == ["too large", "no Ray", "no Ray"]
    assert tries == [cell.name for cell in sweep.cells for _ in range(2)]
