"""The run directory: a run keeps its data and base model, and a refused start leaves nothing behind."""

from pathlib import Path

import pytest

from orchestrator.checks.folders import differences
from orchestrator.config.schema import (
    CheckpointSpec,
    DataSpec,
    JobSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    SourceSpec,
)
from orchestrator.errors import ClusterError, SpecError, TrainingError
from orchestrator.run.recorder import ATTEMPTS
from orchestrator.run.run_dir import (
    DATA,
    discard_refused_run,
    load_base_model_id,
    missing_directories,
    open_run,
    record_job,
    remove_ray_marker,
    require_same_base,
    require_same_data,
)

OLD, NEW = Path("cache/plan-a"), Path("cache/plan-b")
HELD_OUT = {"code": Path("cache/plan-c"), "chat": Path("cache/plan-d")}


def test_data_may_change_until_the_first_attempt(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, {})
    require_same_data(tmp_path, NEW, HELD_OUT)
    assert "plan-b" in (tmp_path / DATA).read_text()


def test_a_run_resumes_only_with_the_data_it_started_with(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, HELD_OUT)
    (tmp_path / ATTEMPTS).write_text("{}\n")
    require_same_data(tmp_path, Path("elsewhere") / OLD.name, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train changed since run .* started"):
        require_same_data(tmp_path, NEW, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train and data\.eval"):
        require_same_data(tmp_path, NEW, {})
    assert "plan-a" in (tmp_path / DATA).read_text()


def test_a_run_resumes_only_with_the_base_model_it_started_with(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"base\.json, which identifies the base model .* is missing"):
        load_base_model_id(tmp_path)
    require_same_base(tmp_path, {"config": "a", "weights": "x"})
    require_same_base(tmp_path, {"config": "a", "weights": "y"})
    (tmp_path / ATTEMPTS).write_text("{}\n")
    require_same_base(tmp_path, {"config": "a", "weights": "y"})
    with pytest.raises(SpecError, match=r"is not the base model that run .* started with \(weights differ\)"):
        require_same_base(tmp_path, {"config": "a", "weights": "z"})
    assert load_base_model_id(tmp_path) == {"config": "a", "weights": "y"}


def job(storage: Path, **memory: object) -> JobSpec:
    parallel = {name: memory.pop(name) for name in ("offload_activations", "zero_stage") if name in memory}
    return JobSpec(
        name="run",
        model=ModelSpec(path="m", **memory),  # type: ignore[arg-type]
        data=DataSpec(train=(SourceSpec(path="d"),)),
        parallel=ParallelSpec(**parallel),  # type: ignore[arg-type]
        checkpoint=CheckpointSpec(storage=str(storage)),
    )


def test_a_run_may_resume_with_another_layout_and_settings_that_save_memory(tmp_path: Path) -> None:
    run_dir = open_run(job(tmp_path))
    record_job(run_dir, job(tmp_path))
    (run_dir / ATTEMPTS).write_text("{}\n")
    open_run(job(tmp_path, mlp_tile_tokens=512, loss_tile_tokens=512, offload_activations="cpu"))
    open_run(job(tmp_path, gradient_checkpointing="selective"))
    open_run(job(tmp_path, zero_stage=2))
    with pytest.raises(SpecError, match=r"model\.dtype=bf16 \(the run has auto\)"):
        open_run(job(tmp_path, dtype="bf16"))


def test_8_bit_state_keeps_its_partitions(tmp_path: Path) -> None:
    def of(workers: int, zero_stage: int) -> JobSpec:
        layout = ParallelSpec(workers=workers, zero_stage=zero_stage)  # type: ignore[arg-type]
        optim = OptimSpec(optimizer="adamw_8bit")
        return job(tmp_path).model_copy(update={"parallel": layout, "optim": optim})

    assert list(differences(of(2, 2), of(4, 1))) == ["parallel.workers", "parallel.zero_stage"]
    assert list(differences(of(2, 0), of(4, 0))) == [], "whole parameters, whatever the workers"
    offloaded = of(2, 2).model_copy(update={"parallel": ParallelSpec(workers=2, zero_stage=2, device="cpu")})
    assert differences(of(2, 2), offloaded) == {}


def test_an_unwritable_storage_is_refused_before_a_directory_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"checkpoint\.storage=.* cannot be written"):
        open_run(job(tmp_path / "file" / "runs"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_refused_start_leaves_no_directory(tmp_path: Path) -> None:
    storage = tmp_path / "a" / "runs"
    created = missing_directories(storage / "run")
    assert created == [storage / "run", storage, tmp_path / "a"]
    run_dir = open_run(job(storage))
    for name in ("job.yaml", "data.json", "base.json", "plan.json", "owner.json"):
        (run_dir / name).write_text("{}")
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "driver.log").write_text("refused")
    (storage / ".cache").mkdir()
    discard_refused_run(run_dir, created)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kept", "content"),
    [
        ("notes.txt", "the user's"),
        ("logs/rank-0.log", "of a worker"),
        ("attempts.jsonl", "{}"),
        ("plan.json", '{"verdict": "does not fit"}'),
    ],
)
def test_files_of_the_user_and_the_plan_with_the_reason_stay(tmp_path: Path, kept: str, content: str) -> None:
    created = missing_directories(tmp_path / "run")
    run_dir = open_run(job(tmp_path))
    (run_dir / kept).parent.mkdir(exist_ok=True)
    (run_dir / kept).write_text(content)
    discard_refused_run(run_dir, created)
    assert (run_dir / kept).read_text() == content


def test_an_existing_run_directory_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    created = missing_directories(tmp_path / "run")
    run_dir = open_run(job(tmp_path))
    (run_dir / "job.yaml").write_text("of an earlier start")
    discard_refused_run(run_dir, created)
    assert (run_dir / "job.yaml").read_text() == "of an earlier start"


def test_only_the_marker_of_ray_train_is_removed(tmp_path: Path) -> None:
    for name in (".validate_storage_marker", ".other"):
        (tmp_path / name).write_text("")
    for _ in range(2):
        remove_ray_marker(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".other"]
    remove_ray_marker(tmp_path / "none")


def test_an_interrupted_write_keeps_the_old_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = open_run(job(tmp_path))
    record_job(run_dir, job(tmp_path))
    before = (run_dir / "job.yaml").read_text()

    def die(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt  # as if killed in the middle of the write

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        record_job(run_dir, job(tmp_path).model_copy(update={"name": "another"}))
    assert (run_dir / "job.yaml").read_text() == before
