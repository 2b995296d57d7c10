"""Kill a worker with optimizer state on NVMe: the run resumes, and no file is left on the disk."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from orchestrator.engine import nvme_dir
from tests.conftest import Observed, finish, job_text, losses, orchestrator, start, step_rows, wait_until
from tests.invariant.test_nvme import needs_async_io

pytestmark = [pytest.mark.ray, needs_async_io]
MEMORY = Path("/dev/shm")


def _job(folder: Path, offload_path: Path) -> None:
    on_disk = {f"parallel__offload_{part}": "nvme" for part in ("optimizer", "param")}
    changes = {**on_disk, "checkpoint__every_steps": 4, "parallel__offload_path": str(offload_path)}
    (folder / "job.yaml").write_text(job_text(folder / "runs", **changes))


@pytest.mark.skipif(
    not MEMORY.exists() or nvme_dir._file_system_of(MEMORY.stat().st_dev) != "tmpfs",
    reason="there is no tmpfs at /dev/shm",
)
def test_a_directory_on_tmpfs_is_refused_by_the_worker(tmp_path: Path) -> None:
    _job(tmp_path, MEMORY)
    done = orchestrator("train", "job.yaml", cwd=tmp_path)
    assert done.code == 3
    assert f"parallel.offload_path={MEMORY} on {os.uname().nodename} is on tmpfs" in done.err
    assert not (tmp_path / "runs" / "run" / "steps.jsonl").exists()


def test_a_run_resumes_after_a_killed_worker_and_removes_its_files(
    undisturbed_run: Observed, tmp_path: Path
) -> None:
    nvme, run = tmp_path / "disk", tmp_path / "runs" / "run"
    _job(tmp_path, nvme)
    leftover = nvme / "run.rank-0.0123abcd.swap"
    leftover.mkdir(parents=True)
    (leftover / "state").write_text("state of an earlier run")

    process = start("train", "job.yaml", "--json", cwd=tmp_path)
    wait_until(lambda: len(step_rows(run)) >= 6, 200, "six steps done")
    begun = {path.name for path in nvme.iterdir()}
    assert sorted(name.rpartition(".rank-")[2][0] for name in begun) == ["0", "1"]
    assert leftover.name not in begun
    assert all(any(path.rglob("*exp_avg*.swp")) for path in nvme.iterdir())
    os.kill(json.loads((run / "workers.json").read_text())[1]["pid"], signal.SIGKILL)
    done = finish(process)

    assert done.code == 0, done.err
    assert json.loads(done.out)["restarts"] == 1
    assert list(nvme.iterdir()) == []
    assert losses(run) == pytest.approx(losses(undisturbed_run.folder), rel=1e-5)
    assert list((run / "export").glob("model*.safetensors"))
