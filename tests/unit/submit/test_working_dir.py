"""Files uploaded with a job, and errors for paths that a cluster cannot see."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.package_data import ROOT
from orchestrator.submit import working_dir
from orchestrator.submit.working_dir import create_working_dir

ROWS = ROOT / "orchestrator" / "builtin" / "alpaca_sample.jsonl"
FOREIGN_PACKAGES = ("orchestrator", "launch", "cluster", "ds_configs")
BUNDLED_FILES = ("cluster/catalogue.toml", "launch/jobs/quickstart.yaml", "ds_configs/README.md")


def job(*paths: str, eval_paths: tuple[str, ...] = (), **changes: Any) -> JobSpec:
    sections = {
        "name": "case",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": path} for path in paths or ("builtin/alpaca_sample",)]},
        "checkpoint": {"storage": "/mnt/shared/runs"},
        **changes,
    }
    if eval_paths:
        sections["eval"] = {"data": [{"path": path} for path in eval_paths]}
    return loader.parse(json.dumps(sections))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a project with packages that have the same names as ours."""
    project = tmp_path / "project"
    for name in FOREIGN_PACKAGES:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("raise RuntimeError('another project')\n")
    monkeypatch.chdir(project)
    return project


def uploaded(tmp_path: Path, spec: JobSpec) -> tuple[set[str], list[str]]:
    """Return the uploaded files other than this package, and the notes."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("orchestrator")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    folder = tmp_path / "working_dir"
    working_dir.create_working_dir(spec, folder)
    logger.removeHandler(handler)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"orchestrator/cli/main.py", "orchestrator/cluster/auth.py"} <= files
    assert {f"orchestrator/_bundled/{name}" for name in BUNDLED_FILES} <= files
    assert "another project" not in (folder / "orchestrator" / "__init__.py").read_text()
    rest = {file for file in files if file.split("/")[0] != "orchestrator"}
    return rest - {"job.yaml"}, messages


def problems(spec: JobSpec, tmp_path: Path) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        create_working_dir(spec, tmp_path / "working_dir")
    assert not (tmp_path / "working_dir").exists() or not any((tmp_path / "working_dir").iterdir())
    return caught.value.problems


def test_data_folders_and_files_are_uploaded(here: Path, tmp_path: Path) -> None:
    for name in ("data/rows/a.jsonl", "data/rows/deep/b.jsonl.gz", "data/rows/.hidden.jsonl", "held.jsonl"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROWS, here / name)
    (here / "data" / "rows" / "README").write_text("text")
    (here / "data" / "rows" / ".gitignore").write_text("*\n")
    files, notes = uploaded(tmp_path, job("data/rows/", eval_paths=("./held.jsonl",)))
    assert files == {"data/rows/a.jsonl", "data/rows/deep/b.jsonl.gz", "held.jsonl"}
    assert notes == ["data folder data/rows/: uploading 2 files (0.2 MiB); 3 unused files skipped"]


def test_symbolic_links_are_followed(here: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROWS, tmp_path / "elsewhere" / "a.jsonl")
    (here / "data").mkdir()
    (here / "data" / "rows").symlink_to(tmp_path / "elsewhere")
    assert uploaded(tmp_path, job("data/rows"))[0] == {"data/rows/a.jsonl"}
    assert not (tmp_path / "working_dir" / "data" / "rows" / "a.jsonl").is_symlink()


def test_a_saved_dataset_is_uploaded_with_its_metadata(here: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(here / "saved"))
    spec = job("saved", data={"train": [{"path": "saved", "split": "train"}]})
    files, _ = uploaded(tmp_path, spec)
    assert {"saved/dataset_dict.json", "saved/train/state.json"} <= files
    assert [name for name in files if name.endswith(".arrow")] == ["saved/train/data-00000-of-00001.arrow"]


def test_hub_names_uris_and_absolute_paths_are_unchanged(tmp_path: Path) -> None:
    files, notes = uploaded(
        tmp_path, job("tatsu-lab/alpaca", "s3://bucket/rows", "/mnt/rows.jsonl", "~/rows.jsonl")
    )
    assert files == set()
    assert notes == ["data tatsu-lab/alpaca does not exist locally and is assumed to be a hub dataset"]
    text = (tmp_path / "working_dir" / "job.yaml").read_text()
    assert "/mnt/rows.jsonl" in text
    assert "~/rows.jsonl" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rows.jsonl", "data file rows.jsonl is not there"),
        ("./rows", "data file ./rows is not there"),
        ("data/rows.json", "data file data/rows.json is not there"),
        ("data/rows", "data is a local folder"),
        ("../rows.jsonl", "leaves the working directory"),
        ("data", "has no file with rows"),
        ("job.yaml", "is YAML, which is not read"),
        ("orchestrator/cli/main.py", "overwrite a file of orchestrator"),
    ],
)
def test_paths_that_a_cluster_cannot_see_are_rejected(
    path: str, words: str, here: Path, tmp_path: Path
) -> None:
    (here / "data").mkdir()
    (here / "job.yaml").write_text("{}")
    (here / "orchestrator" / "cli").mkdir()
    (here / "orchestrator" / "cli" / "main.py").write_text("{}")
    for spec in (job(path), job(eval_paths=(path,))):
        (problem,) = problems(spec, tmp_path)
        assert words in problem


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    spec = job(
        "a.jsonl",
        "../b.jsonl",
        model={"path": "./model"},
        checkpoint={"storage": "runs"},
        parallel={"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": "disk"},
    )
    text = " ".join(problems(spec, tmp_path))
    for part in ("a.jsonl", "../b.jsonl", "model.path=./model", "storage=runs", "offload_path=disk"):
        assert part in text


def test_the_size_limit_applies_to_all_data_files(here: Path, tmp_path: Path) -> None:
    (here / "rows").mkdir()
    for name in ("rows/a.jsonl", "rows/b.jsonl", "c.jsonl"):
        with (here / name).open("wb") as file:
            file.truncate(22 * 2**20)
    (problem,) = problems(job("rows", "c.jsonl"), tmp_path)
    assert "66.0 MiB in total" in problem
    assert "than 64 MiB are uploaded" in problem
    assert uploaded(tmp_path, job("rows"))[0] == {"rows/a.jsonl", "rows/b.jsonl"}


def test_the_working_dir_contains_no_values_of_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_HERE", "secret-3")
    spec = job(run={"env": {"TOKEN": "secret-1", "OTHER": None, "FROM_HERE": None}})
    spec = working_dir.with_env_options(spec, ["OTHER=secret-2", "TOKEN=secret=4"])
    uploaded(tmp_path, spec)
    assert not [
        file
        for file in (tmp_path / "working_dir").rglob("*")
        if file.is_file() and b"secret-" in file.read_bytes()
    ]
    inside = loader.load(tmp_path / "working_dir" / "job.yaml")
    assert inside.run.env == {"TOKEN": None, "OTHER": None, "FROM_HERE": None}
    env = working_dir.env_to_send(spec, inherit=False)
    assert env == {"TOKEN": "secret=4", "OTHER": "secret-2", "FROM_HERE": "secret-3"}


def test_default_variables_are_sent_unless_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "https_proxy", "NCCL_DEBUG", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "here")
    spec = job(run={"env": {"HF_TOKEN": "of the job"}})
    env = working_dir.env_to_send(spec, inherit=True)
    assert env["HF_TOKEN"] == "of the job"
    assert env["https_proxy"] == env["NCCL_DEBUG"] == "here"
    assert "AWS_SECRET_ACCESS_KEY" not in env
    assert working_dir.env_to_send(spec, inherit=False) == {"HF_TOKEN": "of the job"}


def test_errors_for_env_options_do_not_contain_values() -> None:
    with pytest.raises(SpecError) as caught:
        working_dir.with_env_options(
            job(), ["=secret", "A B=secret", "NOT_SET_ANYWHERE", "LD_PRELOAD=secret"]
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "secret" not in text
    assert "NOT_SET_ANYWHERE is not set; export it" in text
    assert "LD_PRELOAD would have no effect" in text


def test_files_of_a_pattern_are_uploaded(here: Path, tmp_path: Path) -> None:
    for name in ("data/a.jsonl", "data/b.jsonl", "data/c.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROWS, here / name)
    files, _ = uploaded(tmp_path, job("data/*.jsonl"))
    assert files == {"data/a.jsonl", "data/b.jsonl"}
    assert "matches no file" in problems(job("data/*.csv"), tmp_path / "other")[0]
