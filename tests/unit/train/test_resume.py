"""A finished run returns its report only for the same job, and a resumed run keeps its finished steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.run.recorder import ATTEMPTS, REPORT, STEPS
from orchestrator.run.run_dir import open_run, record_job, require_same_data
from orchestrator.train.resume import finished_before, input_files, require_steps_to_go


def make_job(root: Path, **optim: Any) -> JobSpec:
    """Return a job whose model and data are in a folder; creates missing files."""
    if not (root / "model").exists():
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text("{}")
        (root / "model" / "tokenizer.json").write_text("[]")
        (root / "model" / "model.safetensors").write_bytes(b"weights")
        (root / "data").mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            (root / "data" / name).write_text('{"text": "x"}\n')
        (root / "eval.jsonl").write_text('{"text": "y"}\n')
    return JobSpec.model_validate_json(
        json.dumps(
            {
                "name": "run",
                "model": {"path": str(root / "model")},
                "data": {"train": [{"path": str(root / "data")}]},
                "eval": {"data": [{"path": str(root / "eval.jsonl")}]},
                "optim": {"global_batch_size": 8, "lr": 1e-3, **optim},
                "checkpoint": {"storage": str(root / "runs")},
            }
        )
    )


def finish(root: Path, job: JobSpec, steps: int) -> Path:
    """Write the files of a run that finished all its steps; return the run directory."""
    run_dir = open_run(job)
    require_same_data(run_dir, Path("plan-a"), {"eval": Path("plan-b")}, input_files(job))
    record_job(run_dir, job)
    (run_dir / ATTEMPTS).write_text(json.dumps({"attempt": 1, "steps_planned": steps}) + "\n")
    (run_dir / STEPS).write_text("".join(json.dumps({"step": n + 1}) + "\n" for n in range(steps)))
    (run_dir / REPORT).write_text(json.dumps({"steps": steps, "loss": 1.0}))
    return run_dir


def test_the_same_job_again_is_answered_with_what_was(tmp_path: Path, logged: list[str]) -> None:
    job = make_job(tmp_path, max_steps=3)
    assert finished_before(job) is None, "no run yet"
    run_dir = finish(tmp_path, job, 3)
    for file in (tmp_path / "data" / "a.jsonl", tmp_path / "eval.jsonl"):
        os.utime(file, (1, 1))  # a new mtime does not change the content
    assert finished_before(job) == {"steps": 3, "loss": 1.0}
    (line,) = logged
    assert line.startswith(f"run {run_dir} already finished (20")
    assert "3 steps), so nothing was trained" in line


def replace_text(path: str, text: str) -> Any:
    def change(root: Path) -> None:
        (root / path).write_text(text)

    return change


def add_file(root: Path) -> None:
    (root / "data" / "c.jsonl").write_text('{"text": "z"}\n')


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_text("data/b.jsonl", '{"text": "w"}\n'), r"data\.train \(.*/data\)"),
        (add_file, r"data\.train \(.*/data\)"),
        (replace_text("eval.jsonl", '{"text": "w"}\n'), r"eval\.data \(.*/eval\.jsonl\)"),
        (replace_text("model/tokenizer.json", "[1]"), r"model\.path \(tokenizer\.json\)"),
        (replace_text("model/model.safetensors", "Weights"), r"model\.path \(model\.safetensors\)"),
        (replace_text("model/chat_template.jinja", "x"), r"model\.path \(chat_template\.jinja\)"),
    ],
)
def test_other_files_are_another_job(change: Any, named: str, tmp_path: Path, logged: list[str]) -> None:
    job = make_job(tmp_path, max_steps=3)
    finish(tmp_path, job, 3)
    change(tmp_path)
    with pytest.raises(SpecError, match=named + " changed since run .* started"):
        finished_before(job)
    assert not logged


def test_other_hyperparameters_are_another_job(tmp_path: Path, logged: list[str]) -> None:
    finish(tmp_path, make_job(tmp_path, max_steps=3), 3)
    with pytest.raises(SpecError, match=r"a run of another job: optim\.lr=0\.1 \(the run has 0\.001\)"):
        finished_before(make_job(tmp_path, max_steps=3, lr=0.1))


def test_fewer_steps_than_are_done_are_refused_before_anything_starts(
    tmp_path: Path, logged: list[str]
) -> None:
    run_dir = finish(tmp_path, make_job(tmp_path, max_steps=3), 3)
    with pytest.raises(SpecError, match=r"optim\.max_steps=2 means 2 steps, and run .* has already done 3"):
        finished_before(make_job(tmp_path, max_steps=2))
    with pytest.raises(SpecError, match=r"optim\.epochs=1\.0 means 2 steps, and run .* has already done 3"):
        require_steps_to_go(make_job(tmp_path), run_dir, packs=16)
    assert (run_dir / REPORT).exists()


def test_more_steps_go_on_and_keep_the_report_of_then(tmp_path: Path, logged: list[str]) -> None:
    run_dir = finish(tmp_path, make_job(tmp_path, max_steps=3), 3)
    more = make_job(tmp_path, max_steps=5)
    assert finished_before(more) is None
    assert require_steps_to_go(more, run_dir, packs=40) is None
    assert logged == [
        "the run resumes from step 3 and trains to step 5 instead of 3; by its cosine schedule, which now "
        "ends there, the learning rate stays 0.0005 in step 4"
    ]
    assert json.loads((run_dir / "report.step-00000003.json").read_text())["steps"] == 3
    assert not (run_dir / REPORT).exists(), "or a kill would leave it for the longer run's"


def test_as_many_steps_in_other_words_are_the_same_job(tmp_path: Path, logged: list[str]) -> None:
    run_dir = finish(tmp_path, make_job(tmp_path, max_steps=3), 3)
    same = make_job(tmp_path, epochs=1.0)
    assert finished_before(same) is None, "only the packs can tell"
    assert require_steps_to_go(same, run_dir, packs=24) == {"steps": 3, "loss": 1.0}
    assert "nothing was trained" in logged[0]


def test_packs_that_a_cut_short_step_leaves_out_are_counted(tmp_path: Path, logged: list[str]) -> None:
    run_dir = finish(tmp_path, make_job(tmp_path), 3)  # 20 packs: 8, 8 and 4
    assert require_steps_to_go(make_job(tmp_path, epochs=2.0), run_dir, packs=20) is None
    assert logged[1] == (
        "step 3 was a partial batch, 4 packs short; the first 4 packs of the next epoch are skipped for it"
    )


def test_a_run_that_has_not_finished_goes_by_the_same_rule(tmp_path: Path, logged: list[str]) -> None:
    run_dir = finish(tmp_path, make_job(tmp_path, max_steps=9), 4)
    (run_dir / ATTEMPTS).write_text(json.dumps({"attempt": 1, "steps_planned": 9}) + "\n")
    (run_dir / REPORT).unlink()
    assert require_steps_to_go(make_job(tmp_path, max_steps=9), run_dir, 40) is None
    assert not logged, "nothing is new"
    assert require_steps_to_go(make_job(tmp_path, max_steps=6), run_dir, 40) is None
    assert "from step 4 and trains to step 6 instead of 9" in logged[0]
    with pytest.raises(SpecError, match="has already done 4"):
        require_steps_to_go(make_job(tmp_path, max_steps=3), run_dir, 40)
