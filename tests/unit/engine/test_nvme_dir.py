"""Each worker has its own directory for NVMe offload; directories of dead workers are removed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, OptimSpec, ParallelSpec, SourceSpec
from orchestrator.engine import nvme_dir
from orchestrator.errors import ClusterError
from orchestrator.parallel.deepspeed_config import render

LEFT = "j.rank-1.0123abcd.swap"
HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


class _Interrupted(Exception):
    """Ends a run before it is complete."""


def job(path: Path | None, **parallel: Any) -> JobSpec:
    section = {"workers": 2, "zero_stage": 3, "offload_optimizer": "nvme", **parallel}
    return JobSpec(
        name="j",
        model=ModelSpec(path="m"),
        data=DataSpec(train=(SourceSpec(path="d"),)),
        parallel=ParallelSpec(**section, offload_path=None if path is None else str(path)),
        optim=OptimSpec(global_batch_size=2),
    )


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process rank 0 of two ranks with equal results."""

    def gather(everyone: list[Any], mine: Any) -> None:
        everyone[:] = [mine] * len(everyone)

    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 2, all_gather_object=gather)
    monkeypatch.setattr(nvme_dir, "dist", group)


@pytest.fixture
def live_worker(tmp_path: Path) -> Iterator[Path]:
    """Return the directory of another worker that is alive."""
    folder = tmp_path / "j.rank-2.aaaaaaaa.swap"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield folder
        process.kill()


def refusal(spec: JobSpec, needed_bytes: int = 0) -> str:
    with (
        pytest.raises(ClusterError) as caught,
        nvme_dir.open_nvme_dir(spec, render(spec, "fp32", "cpu"), needed_bytes),
    ):
        pytest.fail("no error was raised")
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("offload_param", ["none", "cpu", "nvme"])
def test_the_directory_of_a_worker_is_removed_afterwards(tmp_path: Path, offload_param: str) -> None:
    spec = job(tmp_path / "new", offload_param=offload_param)
    rendered = render(spec, "fp32", "cpu")
    before = str(rendered)
    with suppress(_Interrupted), nvme_dir.open_nvme_dir(spec, rendered, 1) as config:
        (folder,) = (tmp_path / "new").iterdir()
        assert folder.name.startswith("j.rank-0.")
        zero = config["zero_optimization"]
        assert zero["offload_optimizer"]["nvme_path"] == str(folder)
        if offload_param == "nvme":
            assert zero["offload_param"]["nvme_path"] == str(folder)
        else:
            assert "nvme_path" not in zero.get("offload_param", {})
        (folder / "state").write_text("swapped", encoding="utf-8")
        raise _Interrupted
    assert list((tmp_path / "new").iterdir()) == []
    assert str(rendered) == before


@pytest.mark.usefixtures("two_ranks")
def test_no_directory_is_created_without_nvme_offload() -> None:
    spec = job(None, offload_optimizer="cpu")
    rendered = render(spec, "fp32", "cpu")
    with nvme_dir.open_nvme_dir(spec, rendered, 0) as config:
        assert config == rendered


@pytest.mark.process
@pytest.mark.usefixtures("two_ranks")
def test_only_directories_of_dead_workers_are_removed(tmp_path: Path, live_worker: Path) -> None:
    (tmp_path / LEFT / "zero_stage_3").mkdir(parents=True)
    (tmp_path / "notes.swap").mkdir()
    spec = job(tmp_path)
    with nvme_dir.open_nvme_dir(spec, render(spec, "fp32", "cpu"), 0):
        assert not (tmp_path / LEFT).exists()
    assert {path.name for path in tmp_path.iterdir()} == {live_worker.name, "notes.swap"}


@pytest.mark.usefixtures("two_ranks")
def test_a_directory_on_tmpfs_is_refused() -> None:
    memory = Path("/dev/shm")
    if nvme_dir._file_system_of(os.stat(memory).st_dev if memory.exists() else 0) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    before = set(memory.iterdir())
    assert refusal(job(memory)) == (
        f"parallel.offload_path=/dev/shm on {os.uname().nodename} is on tmpfs, which is memory; name "
        "a directory on a disk, or offload to cpu"
    )
    assert set(memory.iterdir()) <= before


@pytest.mark.usefixtures("two_ranks")
def test_a_disk_without_space_for_all_workers_of_the_node_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_dir.os, "statvfs", lambda _: SimpleNamespace(f_bavail=3 * 2**18, f_frsize=4096))
    spec = job(tmp_path)
    with nvme_dir.open_nvme_dir(spec, render(spec, "fp32", "cpu"), 3 * 2**29):
        pass  # two workers with a GiB and a half each
    assert refusal(spec, 3 * 2**29 + 2**20) == (
        f"parallel.offload_path={tmp_path} on {os.uname().nodename} has 3 GiB free, and its 2 workers need "
        "3.002 GiB; free some space, name a directory on a larger disk, or use more parallel.workers"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_ranks")
def test_a_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert refusal(job(tmp_path / "file" / "swap")).endswith(
        "cannot be used (Not a directory); name a directory that every worker can write"
    )
