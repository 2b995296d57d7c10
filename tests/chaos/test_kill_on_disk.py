"""Kill a worker whose optimizer state lies on a disk: the run comes back, and leaves nothing on the disk."""

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


def _job(folder: Path, where: Path) -> None:
    on_disk = {f"parallel__offload_{part}": "nvme" for part in ("optimizer", "param")}
    changes = {**on_disk, "checkpoint__every_steps": 4, "parallel__offload_path": str(where)}
    (folder / "job.yaml").write_text(job_text(folder / "runs", **changes))


@pytest.mark.skipif(
    not MEMORY.exists() or nvme_dir._file_system_of(MEMORY.stat().st_dev) != "tmpfs",
    reason="there is no tmpfs at /dev/shm here",
)
def test_a_folder_in_memory_is_refused_by_the_worker_that_sees_it(tmp_path: Path) -> None:
    _job(tmp_path, MEMORY)
    done = orchestrator("train", "job.yaml", cwd=tmp_path)
    assert done.code == 3
    assert f"parallel.offload_path={MEMORY} on {os.uname().nodename} is on tmpfs" in done.err
    assert not (tmp_path / "runs" / "run" / "steps.jsonl").exists()


def test_a_killed_worker_comes_back_from_the_checkpoint_and_its_files_are_removed(
    undisturbed_run: Observed, tmp_path: Path
) -> None:
    swapped, run = tmp_path / "disk", tmp_path / "runs" / "run"
    _job(tmp_path, swapped)
    left = swapped / "run.rank-0.0123abcd.swap"
    left.mkdir(parents=True)
    (left / "state").write_text("what an earlier run wrote")

    process = start("train", "job.yaml", "--json", cwd=tmp_path)
    wait_until(lambda: len(step_rows(run)) >= 6, 200, "six steps done")
    begun = {path.name for path in swapped.iterdir()}
    assert sorted(name.rpartition(".rank-")[2][0] for name in begun) == ["0", "1"]
    assert left.name not in begun
    assert all(any(path.rglob("*exp_avg*.swp")) for path in swapped.iterdir())
    os.kill(json.loads((run / "workers.json").read_text())[1]["pid"], signal.SIGKILL)
    done = finish(process)

    assert done.code == 0, done.err
    assert json.loads(done.out)["restarts"] == 1
    assert list(swapped.iterdir()) == []
    assert losses(run) == pytest.approx(losses(undisturbed_run.folder), rel=1e-5)
    assert list((run / "export").glob("model*.safetensors"))
