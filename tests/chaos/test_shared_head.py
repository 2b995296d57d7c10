"""Two concurrent runs on the head of one cluster, from a project with packages of the same names as ours.

One is submitted, the other is a driver on the head. Both have environment variables whose values must not be
stored anywhere, both open an endpoint, and both train on a directory of the project.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, Finished, finish, job_text, start, wait_until

pytestmark = pytest.mark.ray
FOREIGN_PACKAGES = ("orchestrator", "launch", "cluster", "ds_configs")
SECRET = "canary-5e1f0c"
PROBE = """
import json, os, sys
import ray
from orchestrator.train import ray_session

def seen():
    import orchestrator
    names = ("HF_TOKEN", "GLOO_X", "MINE", "OTHER")
    return {name: os.environ.get(name) for name in names}, orchestrator.__file__

with ray_session.connected(sys.argv[1], ["MINE"]):
    task = ray.remote(num_cpus=0)(seen).remote()
    class Actor:
        def seen(self):
            return seen()
    actor = ray.remote(num_cpus=0)(Actor).options(runtime_env={"env_vars": {"A": "b"}}).remote()
    print(json.dumps(ray.get([task, actor.seen.remote()])))
"""


@dataclass(frozen=True)
class Head:
    """A cluster of one node: its addresses, and Ray's temporary directory."""

    address: str
    dashboard: str
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path is short
    gcs, dashboard, agent, client = (_free_port() for _ in range(4))
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", "--num-cpus=4", f"--temp-dir={folder}"]
    env = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_until(lambda: _responds(f"{url}/api/version"), 90, "the dashboard responds")
        yield Head(f"127.0.0.1:{gcs}", url, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a directory with packages that fail at import, and with a directory of rows."""
    for name in FOREIGN_PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of another project')\n")
    (tmp_path / "data" / "rows").mkdir(parents=True)
    shutil.copy(ROOT / "orchestrator" / "builtin" / "alpaca_sample.jsonl", tmp_path / "data" / "rows")
    return tmp_path


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `orchestrator` like its console script: without the working directory on sys.path."""
    return start(*arguments, cwd=cwd, options=("-P",), **environment)


def test_tasks_and_actors_have_the_environment_variables_of_the_driver(head: Head, project: Path) -> None:
    variables = {"HF_TOKEN": SECRET, "GLOO_X": "1", "MINE": "2", "OTHER": "3"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, head.address],
        cwd=project,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for seen, package in json.loads(done.stdout.splitlines()[-1]):
        assert seen == {**variables, "OTHER": None}
        assert package == str(ROOT / "orchestrator" / "__init__.py")


def test_two_concurrent_runs_start_and_store_no_values(head: Head, project: Path) -> None:
    targets = project / "targets"
    for name in ("submitted", "driven"):
        job = job_text(
            project / "runs",
            data__train=[{"path": "data/rows"}],
            name=name,
            parallel__workers=1,
            parallel__zero_stage=2,
            optim__max_steps=6,
            metrics__port="auto",
            run__env={"IN_THE_JOB": SECRET, "FROM_HERE": None, "ORCHESTRATOR_TARGETS": str(targets)},
        )
        (project / f"{name}.yaml").write_text(job)
    variables = {"HF_TOKEN": SECRET, "FROM_HERE": SECRET, "GIVEN": SECRET}
    runs = {name: project / "runs" / name for name in ("submitted", "driven")}
    ports, listed = [], []
    with _Watch() as watch:
        options = ("--address", head.dashboard, "--no-doctor", "--env", "GIVEN")
        first = command("submit", "submitted.yaml", *options, cwd=project, **variables)
        second = command("train", "driven.yaml", "--address", head.address, cwd=project, **variables)
        try:
            both = [run / "metrics.json" for run in runs.values()]
            wait_until(
                lambda: all(file.exists() for file in both) or first.poll() or second.poll(),
                300,
                "both endpoints are open",
            )
            ports = [json.loads(file.read_text())["port"] for file in both if file.exists()]
            listed = [json.loads(file.read_text())[0]["targets"][0] for file in targets.glob("*.json")]
        finally:
            ended = [finish(process) for process in (first, second)]
    _assert_ended_well(ended)
    assert len(set(ports)) == 2
    assert all(9400 <= port < 9500 for port in ports)
    assert sorted(listed) == sorted(f"localhost:{port}" for port in ports)
    assert list(targets.glob("*.json")) == []
    for (name, run), port, done in zip(runs.items(), ports, ended, strict=True):
        assert f"metrics on port {port}" in done.out
        assert json.loads((run / "report.json").read_text())["metrics_port"] == port
        text = (run / "job.yaml").read_text()
        assert ("FROM_HERE: null" in text, "GIVEN: null" in text) == (True, name == "submitted")
    assert watch.seen == set(), "values are in no command line"
    for folder in (head.folder, project / "runs"):
        assert _files_with_the_secret(folder) == []
    with urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=30) as answer:
        assert SECRET not in answer.read().decode()


def test_a_local_ray_imports_our_packages_from_a_project_with_the_same_names(project: Path) -> None:
    (project / "job.yaml").write_text(
        job_text(project / "runs", data__train=[{"path": "data/rows"}], run__env={"GIVEN": SECRET})
    )
    done = finish(command("pack", "job.yaml", "--json", cwd=project))
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 320


def _assert_ended_well(ended: list[Finished]) -> None:
    for done in ended:
        assert done.code == 0, f"{done.out[-4000:]}\n{done.err[-4000:]}"
        assert SECRET not in done.out + done.err
        assert "Traceback" not in done.out + done.err

        # Each line of the log is printed once, although lines of different steps may be equal.
        assert sum(line.startswith("training from step 0") for line in done.out.splitlines()) == 1


class _Watch:
    """Polls the command lines of all processes for the secret."""

    def __enter__(self) -> _Watch:
        self.seen: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.05):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    line = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if SECRET.encode() in line:
                    self.seen.add(line.decode(errors="replace"))


def _files_with_the_secret(folder: Path) -> list[str]:
    files = []
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root) / name
            if file.is_file() and SECRET.encode() in file.read_bytes():
                files.append(str(file))
    return files


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
