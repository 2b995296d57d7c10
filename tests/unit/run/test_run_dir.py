"""A run is held to the data that it began with."""

from pathlib import Path

import pytest

from orchestrator.config.schema import CheckpointSpec, DataSpec, JobSpec, ModelSpec, ParallelSpec, SourceSpec
from orchestrator.errors import ClusterError, SpecError, TrainingError
from orchestrator.run.recorder import ATTEMPTS
from orchestrator.run.run_dir import (
    DATA,
    absent_folders,
    base_of,
    number_format,
    open_run,
    record_job,
    remove_marker,
    require_same_base,
    require_same_data,
    withdraw,
)

OLD, NEW, HELD_OUT = Path("cache/plan-a"), Path("cache/plan-b"), Path("cache/plan-c")


def test_data_may_change_until_the_run_has_begun(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, None)
    require_same_data(tmp_path, NEW, HELD_OUT)
    assert "plan-b" in (tmp_path / DATA).read_text()


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, HELD_OUT)
    (tmp_path / ATTEMPTS).write_text("{}\n")
    require_same_data(tmp_path, Path("elsewhere") / OLD.name, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train of the run .* changed since it began"):
        require_same_data(tmp_path, NEW, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train and data\.eval"):
        require_same_data(tmp_path, NEW, None)
    assert "plan-a" in (tmp_path / DATA).read_text()


def test_a_run_goes_on_beside_the_model_that_it_began_with(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no base\.json"):
        base_of(tmp_path)
    require_same_base(tmp_path, {"config": "a", "weights": "x"})
    require_same_base(tmp_path, {"config": "a", "weights": "y"})
    (tmp_path / ATTEMPTS).write_text("{}\n")
    require_same_base(tmp_path, {"config": "a", "weights": "y"})
    with pytest.raises(SpecError, match=r"names another model than when it began \(weights differ\)"):
        require_same_base(tmp_path, {"config": "a", "weights": "z"})
    assert base_of(tmp_path) == {"config": "a", "weights": "y"}


def job(storage: Path, **memory: object) -> JobSpec:
    parallel = {name: memory.pop(name) for name in ("offload_activations", "zero_stage") if name in memory}
    return JobSpec(
        name="run",
        model=ModelSpec(path="m", **memory),  # type: ignore[arg-type]
        data=DataSpec(train=(SourceSpec(path="d"),)),
        parallel=ParallelSpec(**parallel),  # type: ignore[arg-type]
        checkpoint=CheckpointSpec(storage=str(storage)),
    )


def test_a_run_that_met_its_limit_may_go_on_with_more_memory_saved(tmp_path: Path) -> None:
    home = open_run(job(tmp_path))
    record_job(home, job(tmp_path))
    (home / ATTEMPTS).write_text("{}\n")
    open_run(job(tmp_path, mlp_tile_tokens=512, loss_tile_tokens=512, offload_activations="cpu"))
    open_run(job(tmp_path, gradient_checkpointing="selective"))
    with pytest.raises(SpecError, match=r"parallel\.zero_stage=2 \(the run has 3\)"):
        open_run(job(tmp_path, zero_stage=2))


def test_a_run_that_cannot_begin_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"checkpoint\.storage=.* cannot be written"):
        open_run(job(tmp_path / "file" / "runs"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    storage = tmp_path / "a" / "runs"
    made = absent_folders(storage / "run")
    assert made == [storage / "run", storage, tmp_path / "a"]
    home = open_run(job(storage))
    for name in ("job.yaml", "data.json", "base.json", "plan.json", "owner.json"):
        (home / name).write_text("{}")
    (home / "logs").mkdir()
    (home / "logs" / "driver.log").write_text("refused")
    (storage / ".cache").mkdir()
    withdraw(home, made)
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
def test_what_a_start_did_not_write_or_says_why_stays(tmp_path: Path, kept: str, content: str) -> None:
    made = absent_folders(tmp_path / "run")
    home = open_run(job(tmp_path))
    (home / kept).parent.mkdir(exist_ok=True)
    (home / kept).write_text(content)
    withdraw(home, made)
    assert (home / kept).read_text() == content


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    made = absent_folders(tmp_path / "run")
    home = open_run(job(tmp_path))
    (home / "job.yaml").write_text("of an earlier start")
    withdraw(home, made)
    assert (home / "job.yaml").read_text() == "of an earlier start"


def test_rays_marker_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (".validate_storage_marker", ".other"):
        (tmp_path / name).write_text("")
    for _ in range(2):
        remove_marker(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".other"]
    remove_marker(tmp_path / "none")


def test_fp16_is_refused_on_cpu_with_the_formats_that_work_there(tmp_path: Path) -> None:
    half = job(tmp_path, dtype="fp16", zero_stage=2)
    assert number_format(half, "cuda") == "fp16"
    with pytest.raises(SpecError, match=r"model\.dtype=fp16 needs CUDA.*use dtype: fp32, or dtype: bf16"):
        number_format(half, "cpu")
    for written, on_cpu in (("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        assert number_format(job(tmp_path, dtype=written), "cpu") == on_cpu


def test_a_job_that_cannot_be_written_whole_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = open_run(job(tmp_path))
    record_job(home, job(tmp_path))
    before = (home / "job.yaml").read_text()

    def die(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt  # as a kill would, in the middle of the file

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        record_job(home, job(tmp_path).model_copy(update={"name": "another"}))
    assert (home / "job.yaml").read_text() == before
