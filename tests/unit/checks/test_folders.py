"""The checks find folders that cannot be created or written, and runs of other jobs, and leave no files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checks import folders
from orchestrator.checks.folders import (
    ATTEMPTS,
    JOB,
    folder_problems,
    run_problems,
    unwritable_reason,
    with_absolute_paths,
)
from orchestrator.checks.job import all_problems, spec_problems
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.run import recorder


def job(storage: Path | str, **sections: Any) -> JobSpec:
    values = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}]},
        "checkpoint": {"storage": str(storage)},
        **sections,
    }
    return JobSpec.model_validate_json(json.dumps(values))


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    changed = tmp_path.stat().st_mtime_ns
    assert unwritable_reason(tmp_path / "a" / "b") is None
    assert list(all_problems(job(tmp_path / "a" / "runs"))) == []
    assert everything(tmp_path) == []
    assert tmp_path.stat().st_mtime_ns == changed


def test_what_stands_in_the_way_of_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert unwritable_reason(tmp_path / "file" / "a" / "b") == f"{tmp_path / 'file'} is a file"
    assert unwritable_reason(tmp_path / "file") == f"{tmp_path / 'file'} is a file"
    assert unwritable_reason(tmp_path / "link" / "a") == f"{tmp_path / 'link'} is a broken symbolic link"
    assert "too long" in str(unwritable_reason(tmp_path / ("a" * 300)))
    assert "cannot store files" in str(unwritable_reason(Path("/proc/a/b")))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert unwritable_reason(tmp_path / "a") == f"no permission to write {tmp_path}"


def test_a_read_only_file_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly)
    assert unwritable_reason(tmp_path / "a") == f"{tmp_path} is on a read-only file system"


def test_storage_and_the_disk_of_offloading_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    offloaded = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": str(tmp_path / "file" / "x")}
    wanted = job(tmp_path / "file" / "runs", parallel=offloaded)
    fields = [fields[0] for fields, _ in folder_problems(wanted)]
    assert fields == ["checkpoint.storage", "parallel.offload_path"]
    elsewhere = [fields[0] for fields, _ in folder_problems(wanted, workers_here=False)]
    assert elsewhere == ["checkpoint.storage"]
    sentences = [sentence for _, sentence in folder_problems(wanted)]
    assert all("cannot be written" in sentence and "is a file" in sentence for sentence in sentences)
    assert list(spec_problems(wanted)) == []  # an error of this machine, exit code 3, and not of the job file
    assert len(list(spec_problems(job(tmp_path / "file", data={"train": [{"path": "absent.json"}]})))) == 2


def record(run_dir: Path, old: JobSpec, attempts: bool = True) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / JOB).write_text(loader.dump(with_absolute_paths(old)))
    if attempts:
        (run_dir / ATTEMPTS).write_text("{}\n")


def test_a_run_of_another_job_is_found(tmp_path: Path) -> None:
    assert recorder.ATTEMPTS == ATTEMPTS
    record(tmp_path / "run", job(tmp_path))
    assert list(run_problems(job(tmp_path))) == []
    assert list(run_problems(job(tmp_path, metrics={"port": None}))) == []  # does not affect training
    ((fields, sentence),) = run_problems(job(tmp_path, optim={"lr": 1e-4}))
    assert fields == ("name", "optim.lr")
    assert "contains a run of another job: optim.lr=0.0001 (the run has 2e-05)" in sentence
    assert [field for field, _ in all_problems(job(tmp_path, optim={"lr": 1e-4}))] == [fields]


def test_a_run_that_never_began_or_cannot_be_read(tmp_path: Path) -> None:
    record(tmp_path / "run", job(tmp_path), attempts=False)
    assert list(run_problems(job(tmp_path, optim={"lr": 1e-4}))) == []
    (tmp_path / "run" / ATTEMPTS).write_text("{}\n")
    (tmp_path / "run" / JOB).write_text("name: [")
    ((fields, sentence),) = run_problems(job(tmp_path))
    assert fields == ("name",)
    assert "contains a run with an invalid job.yaml: job.yaml:1: not valid YAML" in sentence


def test_a_kernel_that_says_nothing_of_mounts_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_MOUNTS", tmp_path / "none")
    assert unwritable_reason(tmp_path / "a") is None


def test_a_disk_for_offloading_that_is_memory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": str(tmp_path)}
    monkeypatch.setattr(folders, "_file_system_of", lambda place: "tmpfs")
    ((fields, sentence),) = folder_problems(job(tmp_path, parallel=offloaded))
    assert fields == ("parallel.offload_path",)
    assert "is on tmpfs, which is in memory" in sentence


def test_a_file_of_the_users_in_the_runs_folder_is_not_overwritten(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "report.json").write_text('{"mine": true}')
    ((fields, sentence),) = run_problems(job(tmp_path))
    assert fields == ("name",)
    assert f"{run_dir} contains a report.json that no run wrote" in sentence
    (run_dir / "report.json").rename(run_dir / "notes.json")
    assert list(run_problems(job(tmp_path))) == []
