"""What travels with a submitted job, and what is refused because it would not be found on a cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.package_data import ROOT
from orchestrator.submit import working_dir
from orchestrator.submit.submit import _pack_working_dir

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
    """Return the working directory of the test: a project with packages of the same names as ours."""
    project = tmp_path / "project"
    for name in FOREIGN_PACKAGES:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("raise RuntimeError('another project')\n")
    monkeypatch.chdir(project)
    return project


def travelled(tmp_path: Path, asked: JobSpec) -> tuple[set[str], list[str]]:
    """Return what travels besides this program, and what is said of it."""
    notes: list[str] = []
    folder = tmp_path / "parcel"
    working_dir.pack(asked, folder, notes.append)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"orchestrator/cli/main.py", "orchestrator/cluster/auth.py"} <= files
    assert {f"orchestrator/_bundled/{name}" for name in BUNDLED_FILES} <= files
    assert "another project" not in (folder / "orchestrator" / "__init__.py").read_text()
    rest = {file for file in files if file.split("/")[0] != "orchestrator"}
    return rest - {"job.yaml"}, notes


def problems(asked: JobSpec, tmp_path: Path) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        _pack_working_dir(asked, tmp_path / "parcel")
    assert not (tmp_path / "parcel").exists() or not any((tmp_path / "parcel").iterdir())
    return caught.value.problems


def test_a_folder_of_data_travels_as_a_file_does(here: Path, tmp_path: Path) -> None:
    for name in ("data/rows/a.jsonl", "data/rows/deep/b.jsonl.gz", "data/rows/.hidden.jsonl", "held.jsonl"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROWS, here / name)
    (here / "data" / "rows" / "README").write_text("text")
    (here / "data" / "rows" / ".gitignore").write_text("*\n")
    files, notes = travelled(tmp_path, job("data/rows/", eval_paths=("./held.jsonl",)))
    assert files == {"data/rows/a.jsonl", "data/rows/deep/b.jsonl.gz", "held.jsonl"}
    assert notes == [
        "data folder data/rows/: 2 files travel (0.2 MiB); 3 other files, which no run reads, stay here"
    ]


def test_a_folder_behind_a_link_travels(here: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROWS, tmp_path / "elsewhere" / "a.jsonl")
    (here / "data").mkdir()
    (here / "data" / "rows").symlink_to(tmp_path / "elsewhere")
    assert travelled(tmp_path, job("data/rows"))[0] == {"data/rows/a.jsonl"}
    assert not (tmp_path / "parcel" / "data" / "rows" / "a.jsonl").is_symlink()


def test_a_saved_data_set_travels_with_what_describes_it(here: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(here / "saved"))
    asked = job("saved", data={"train": [{"path": "saved", "split": "train"}]})
    files, _ = travelled(tmp_path, asked)
    assert {"saved/dataset_dict.json", "saved/train/state.json"} <= files
    assert [name for name in files if name.endswith(".arrow")] == ["saved/train/data-00000-of-00001.arrow"]


def test_names_of_the_hub_uris_and_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    files, notes = travelled(
        tmp_path, job("tatsu-lab/alpaca", "s3://bucket/rows", "/mnt/rows.jsonl", "~/rows.jsonl")
    )
    assert files == set()
    assert notes == ["data tatsu-lab/alpaca is not here, and is taken for a data set of the hub"]
    text = (tmp_path / "parcel" / "job.yaml").read_text()
    assert "/mnt/rows.jsonl" in text
    assert "~/rows.jsonl" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rows.jsonl", "data file rows.jsonl is not there"),
        ("./rows", "data file ./rows is not there"),
        ("data/rows.json", "data file data/rows.json is not there"),
        ("data/rows", "data is a folder here"),
        ("../rows.jsonl", "leaves the working directory"),
        ("data", "has no file with rows"),
        ("job.yaml", "take the place of a file of this program"),
        ("orchestrator/cli/main.py", "take the place of a file of this program"),
    ],
)
def test_what_would_not_be_found_is_refused(path: str, words: str, here: Path, tmp_path: Path) -> None:
    (here / "data").mkdir()
    (here / "job.yaml").write_text("{}")
    (here / "orchestrator" / "cli").mkdir()
    (here / "orchestrator" / "cli" / "main.py").write_text("{}")
    for asked in (job(path), job(eval_paths=(path,))):
        (problem,) = problems(asked, tmp_path)
        assert words in problem


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    asked = job(
        "a.jsonl",
        "../b.jsonl",
        model={"path": "./model"},
        checkpoint={"storage": "runs"},
        parallel={"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": "disk"},
    )
    found = " ".join(problems(asked, tmp_path))
    for part in ("a.jsonl", "../b.jsonl", "model.path=./model", "storage=runs", "offload_path=disk"):
        assert part in found


def test_the_limit_counts_everything_that_travels(here: Path, tmp_path: Path) -> None:
    (here / "rows").mkdir()
    for name in ("rows/a.jsonl", "rows/b.jsonl", "c.jsonl"):
        with (here / name).open("wb") as file:
            file.truncate(22 * 2**20)
    (problem,) = problems(job("rows", "c.jsonl"), tmp_path)
    assert "66.0 MiB together" in problem
    assert "more than 64 MiB" in problem
    assert travelled(tmp_path, job("rows"))[0] == {"rows/a.jsonl", "rows/b.jsonl"}


def test_no_value_of_a_variable_is_in_the_parcel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "secret-3")
    asked = job(run={"env": {"TOKEN": "secret-1", "OTHER": None, "FROM_HERE": None}})
    asked = working_dir.with_variables(asked, ["OTHER=secret-2", "TOKEN=secret=4"])
    travelled(tmp_path, asked)
    assert not [
        file
        for file in (tmp_path / "parcel").rglob("*")
        if file.is_file() and b"secret-" in file.read_bytes()
    ]
    inside = loader.load(tmp_path / "parcel" / "job.yaml")
    assert inside.run.env == {"TOKEN": None, "OTHER": None, "FROM_HERE": None}
    found = working_dir.variables(asked, inherit=False)
    assert found == {"TOKEN": "secret=4", "OTHER": "secret-2", "FROM_HERE": "secret-3"}


def test_default_variables_travel_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "https_proxy", "NCCL_DEBUG", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "here")
    asked = job(run={"env": {"HF_TOKEN": "of the job"}})
    found = working_dir.variables(asked, inherit=True)
    assert found["HF_TOKEN"] == "of the job"
    assert found["https_proxy"] == found["NCCL_DEBUG"] == "here"
    assert "AWS_SECRET_ACCESS_KEY" not in found
    assert working_dir.variables(asked, inherit=False) == {"HF_TOKEN": "of the job"}


def test_variables_of_the_command_line_that_cannot_be_are_refused_without_their_value() -> None:
    with pytest.raises(SpecError) as caught:
        working_dir.with_variables(job(), ["=secret", "A B=secret", "NOT_SET_ANYWHERE", "LD_PRELOAD=secret"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "secret" not in text
    assert "NOT_SET_ANYWHERE is not set here; export it" in text
    assert "LD_PRELOAD would have no effect" in text
