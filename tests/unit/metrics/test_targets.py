"""Live endpoints of a machine have a target file for Prometheus; dead ones do not."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError
from orchestrator.metrics import endpoint, targets
from orchestrator.metrics.endpoint import Endpoint
from orchestrator.metrics.exporter import Exporter, require_port
from orchestrator.metrics.targets import TargetFile, address
from orchestrator.run.recorder import Recorder
from orchestrator.run.run_lock import RunLock
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "targets"
    monkeypatch.setenv(targets.FOLDER_VARIABLE, str(folder))
    return folder


def listed(folder: Path) -> list[str]:
    return sorted(json.loads(file.read_text())[0]["targets"][0] for file in folder.glob("*.json"))


@pytest.fixture
def few_ports(monkeypatch: pytest.MonkeyPatch) -> range:
    """Restrict `auto` to three ports that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            ports = range(first.getsockname()[1], first.getsockname()[1] + 3)
        if ports[-1] < 65_536 and all(_is_free(port) for port in ports):
            monkeypatch.setattr(endpoint, "AUTO_PORTS", ports)
            return ports


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_concurrent_endpoints_get_different_ports(few_ports: range) -> None:
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: Endpoint("127.0.0.1", "auto", str), range(3)))
    try:
        assert sorted(server.port for server in opened) == list(few_ports)
        with pytest.raises(
            ClusterError, match=r"metrics\.port=auto found no port from .* set metrics\.port: 0"
        ):
            Exporter("run", "127.0.0.1", "auto")
        require_port("127.0.0.1", "auto")
    finally:
        for server in opened:
            server.close()


def test_auto_uses_the_first_free_port_and_a_number_is_exact(few_ports: range) -> None:
    first, second = Endpoint("127.0.0.1", "auto", str), Endpoint("127.0.0.1", "auto", str)
    try:
        assert [first.port, second.port] == list(few_ports[:2])
        for open_it in (require_port, lambda host, port: Exporter("run", host, port)):
            with pytest.raises(
                ClusterError, match=f"metrics.port={few_ports[0]} on 127.0.0.1 cannot be opened"
            ):
                open_it("127.0.0.1", few_ports[0])
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("port", ["auto", 0])
def test_an_address_of_another_machine_is_rejected(port: object) -> None:
    with pytest.raises(ClusterError, match=f"metrics.port={port} "):
        require_port("192.0.2.77", port)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "localhost:1"),
        ("0.0.0.0", "localhost:1"),
        ("::", "localhost:1"),
        ("10.0.0.5", "10.0.0.5:1"),
        ("fd00::5", "[fd00::5]:1"),
        ("node-1", "node-1:1"),
    ],
)
def test_the_address_for_a_local_prometheus(host: str, expected: str) -> None:
    assert address(host, 1) == expected


def test_only_live_runs_have_a_target_file(folder: Path) -> None:
    first, second = Exporter("a.b-1", "127.0.0.1", 0), Exporter("run", "127.0.0.1", 0)
    assert listed(folder) == sorted(f"localhost:{exporter.port}" for exporter in (first, second))
    first.close()
    assert listed(folder) == [f"localhost:{second.port}"]
    second.close()
    assert list(folder.iterdir()) == []


def test_target_files_are_readable_by_all_users(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        target = TargetFile(folder, "run", "127.0.0.1", 1)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    target.remove()


@pytest.mark.process
def test_the_target_file_of_a_killed_run_is_removed_by_the_next_run(folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.metrics.targets import "
        "TargetFile;TargetFile(Path(sys.argv[1]), 'killed', '127.0.0.1', 1); os.kill(os.getpid(), "
        "signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=env, check=False)
    (stale,) = folder.iterdir()
    current = TargetFile(folder, "run", "127.0.0.1", 2)
    elsewhere = folder / stale.name.replace("killed.", "container.1")  # another PID namespace
    elsewhere.write_text("[]")
    reused = folder / ".".join(
        ["reused", *current._file.name.split(".")[1:3], "1", "json"]
    )  # PID reused by another process
    reused.write_text("[]")
    (folder / "notes.json").write_text("[]")  # a target file written by a user
    stale.write_text("[]")
    other = TargetFile(folder, "other", "127.0.0.1", 3)
    assert {file.name for file in folder.iterdir()} == {
        current._file.name,
        other._file.name,
        elsewhere.name,
        "notes.json",
    }


def test_a_removed_target_file_is_rewritten(folder: Path) -> None:
    exporter = Exporter("run", "127.0.0.1", 0)
    (file,) = folder.iterdir()
    file.unlink()
    exporter.refresh_target()
    assert listed(folder) == [f"localhost:{exporter.port}"]
    exporter.close()


def test_an_unwritable_folder_does_not_fail_the_run(folder: Path, tmp_path: Path) -> None:
    folder.write_text("in the way")
    run_dir = tmp_path / "home"
    run_dir.mkdir()
    recorder = Recorder(run_dir, "run", RunLock.acquire(run_dir), "127.0.0.1", 0)
    (note,) = recorder.status().notes
    assert note.startswith(f"{folder} cannot be written (")
    assert targets.FOLDER_VARIABLE in note
    recorder.close()
    assert folder.read_text() == "in the way"


def test_metrics_json_exists_while_the_endpoint_is_open(tmp_path: Path) -> None:
    run_lock = RunLock.acquire(tmp_path)
    recorder = Recorder(tmp_path, "run", run_lock, "0.0.0.0", 0)
    endpoint_json = json.loads((tmp_path / "metrics.json").read_text())
    assert endpoint_json["port"] == recorder.status().metrics_port
    assert endpoint_json["target"] == f"localhost:{endpoint_json['port']}"
    assert endpoint_json["pid"] == os.getpid()
    recorder.close()
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "metrics.json").write_text("{}")  # left by a killed run
    Recorder(tmp_path, "run", run_lock, "0.0.0.0", None)
    assert not (tmp_path / "metrics.json").exists()


def test_the_example_configuration_reads_the_default_folder() -> None:
    text = (ROOT / "k8s" / "monitoring" / "prometheus.yml").read_text()
    assert f'files: ["{targets.DEFAULT_FOLDER}/*.json"]' in text
    assert targets.folder({}) == Path(targets.DEFAULT_FOLDER)
    assert targets.folder({targets.FOLDER_VARIABLE: ""}) is None
