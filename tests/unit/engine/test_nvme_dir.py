"""Each worker has a folder of its own on a disk of its node; nothing that another left there stays."""

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
    """Ends a run in its middle."""


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
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be rank 0 of two that find the same."""

    def gather(everyone: list[Any], mine: Any) -> None:
        everyone[:] = [mine] * len(everyone)

    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 2, all_gather_object=gather)
    monkeypatch.setattr(nvme_dir, "dist", group)


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of another worker that lives."""
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
        nvme_dir.swap_folder(spec, render(spec, "fp32", "cpu"), needed_bytes),
    ):
        pytest.fail("it was let in")
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("offload_param", ["none", "cpu", "nvme"])
def test_a_worker_has_a_folder_that_is_gone_afterwards(tmp_path: Path, offload_param: str) -> None:
    spec = job(tmp_path / "new", offload_param=offload_param)
    rendered = render(spec, "fp32", "cpu")
    before = str(rendered)
    with suppress(_Interrupted), nvme_dir.swap_folder(spec, rendered, 1) as config:
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


@pytest.mark.usefixtures("alone")
def test_nothing_is_made_where_nothing_goes_to_a_disk() -> None:
    spec = job(None, offload_optimizer="cpu")
    rendered = render(spec, "fp32", "cpu")
    with nvme_dir.swap_folder(spec, rendered, 0) as config:
        assert config == rendered


@pytest.mark.usefixtures("alone")
def test_what_a_killed_worker_left_is_removed_and_nothing_else(tmp_path: Path, living: Path) -> None:
    (tmp_path / LEFT / "zero_stage_3").mkdir(parents=True)
    (tmp_path / "notes.swap").mkdir()
    spec = job(tmp_path)
    with nvme_dir.swap_folder(spec, render(spec, "fp32", "cpu"), 0):
        assert not (tmp_path / LEFT).exists()
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "notes.swap"}


@pytest.mark.usefixtures("alone")
def test_a_folder_in_memory_is_refused() -> None:
    memory = Path("/dev/shm")
    if nvme_dir._file_system_of(os.stat(memory).st_dev if memory.exists() else 0) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm here")
    before = set(memory.iterdir())
    assert refusal(job(memory)) == (
        f"parallel.offload_path=/dev/shm on {os.uname().nodename} lies on tmpfs, which is memory and no "
        "disk; name a folder on a disk, or offload to cpu"
    )
    assert set(memory.iterdir()) <= before


@pytest.mark.usefixtures("alone")
def test_a_disk_without_room_for_all_workers_of_the_node_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_dir.os, "statvfs", lambda _: SimpleNamespace(f_bavail=3 * 2**18, f_frsize=4096))
    spec = job(tmp_path)
    with nvme_dir.swap_folder(spec, render(spec, "fp32", "cpu"), 3 * 2**29):
        pass  # two workers with a GiB and a half each
    assert refusal(spec, 3 * 2**29 + 2**20) == (
        f"parallel.offload_path={tmp_path} on {os.uname().nodename} has 3 GiB free, and its 2 workers write "
        "3.002 GiB; make room, name a folder on another disk, or use more parallel.workers"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert refusal(job(tmp_path / "file" / "swap")).endswith(
        "cannot be used (Not a directory); name a folder that every worker can write"
    )
