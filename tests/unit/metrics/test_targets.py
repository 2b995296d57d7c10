"""Every live endpoint of a machine is in the folder that Prometheus reads, and none that is dead."""

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
from orchestrator.metrics.targets import Target, address
from orchestrator.run.recorder import Recorder
from orchestrator.run.run_lock import RunLock
from tests.conftest import ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "targets"
    monkeypatch.setenv(targets.PLACE, str(folder))
    return folder


def listed(place: Path) -> list[str]:
    return sorted(json.loads(file.read_text())[0]["targets"][0] for file in place.glob("*.json"))


@pytest.fixture
def few_ports(monkeypatch: pytest.MonkeyPatch) -> range:
    """Let `auto` choose among three ports, which were free a moment ago."""
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


def test_endpoints_that_open_at_the_same_time_share_the_range(few_ports: range) -> None:
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: Endpoint("127.0.0.1", "auto", str), range(3)))
    try:
        assert sorted(each.port for each in opened) == list(few_ports)
        with pytest.raises(ClusterError, match=r"metrics\.port=auto finds none of .* set metrics\.port: 0"):
            Exporter("run", "127.0.0.1", "auto")
        require_port("127.0.0.1", "auto")
    finally:
        for each in opened:
            each.close()


def test_auto_takes_the_first_free_port_and_a_number_stays_strict(few_ports: range) -> None:
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
def test_an_address_of_another_machine_is_refused_at_once(port: object) -> None:
    with pytest.raises(ClusterError, match=f"metrics.port={port} "):
        require_port("192.0.2.77", port)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", "localhost:1"),
        ("0.0.0.0", "localhost:1"),
        ("::", "localhost:1"),
        ("10.0.0.5", "10.0.0.5:1"),
        ("fd00::5", "[fd00::5]:1"),
        ("node-1", "node-1:1"),
    ],
)
def test_where_a_prometheus_of_this_machine_finds_an_endpoint(host: str, found: str) -> None:
    assert address(host, 1) == found


def test_live_runs_are_listed_and_no_others(place: Path) -> None:
    first, second = Exporter("a.b-1", "127.0.0.1", 0), Exporter("run", "127.0.0.1", 0)
    assert listed(place) == sorted(f"localhost:{each.port}" for each in (first, second))
    first.close()
    assert listed(place) == [f"localhost:{second.port}"]
    second.close()
    assert list(place.iterdir()) == []


def test_the_list_is_for_all_users(place: Path) -> None:
    before = os.umask(0o077)
    try:
        target = Target(place, "run", "127.0.0.1", 1)
    finally:
        os.umask(before)
    (file,) = place.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert stat.S_IMODE(place.stat().st_mode) == 0o1777
    target.remove()


@pytest.mark.process
def test_what_a_killed_run_left_is_removed_by_the_next(place: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.metrics.targets import Target;"
        "Target(Path(sys.argv[1]), 'killed', '127.0.0.1', 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(place)], env=env, check=False)
    (left,) = place.iterdir()
    mine = Target(place, "run", "127.0.0.1", 2)
    elsewhere = place / left.name.replace("killed.", "container.1")  # another PID namespace
    elsewhere.write_text("[]")
    again = place / ".".join(["reused", *mine._file.name.split(".")[1:3], "1", "json"])  # an earlier process
    again.write_text("[]")
    (place / "notes.json").write_text("[]")  # of somebody who lists targets by hand
    left.write_text("[]")
    other = Target(place, "other", "127.0.0.1", 3)
    assert {file.name for file in place.iterdir()} == {
        mine._file.name,
        other._file.name,
        elsewhere.name,
        "notes.json",
    }


def test_a_file_that_somebody_removed_comes_back(place: Path) -> None:
    exporter = Exporter("run", "127.0.0.1", 0)
    (file,) = place.iterdir()
    file.unlink()
    exporter.keep_listed()
    assert listed(place) == [f"localhost:{exporter.port}"]
    exporter.close()


def test_a_folder_that_cannot_be_written_ends_no_run(place: Path, tmp_path: Path) -> None:
    place.write_text("in the way")
    run_dir = tmp_path / "home"
    run_dir.mkdir()
    recorder = Recorder(run_dir, "run", RunLock.acquire(run_dir), "127.0.0.1", 0)
    (note,) = recorder.status().notes
    assert note.startswith(f"{place} cannot be written (")
    assert targets.PLACE in note
    recorder.close()
    assert place.read_text() == "in the way"


def test_the_run_says_where_its_endpoint_is_while_there_is_one(tmp_path: Path) -> None:
    run_lock = RunLock.acquire(tmp_path)
    recorder = Recorder(tmp_path, "run", run_lock, "0.0.0.0", 0)
    where = json.loads((tmp_path / "metrics.json").read_text())
    assert where["port"] == recorder.status().metrics_port
    assert where["target"] == f"localhost:{where['port']}"
    assert where["pid"] == os.getpid()
    recorder.close()
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "metrics.json").write_text("{}")  # of a run that was killed
    Recorder(tmp_path, "run", run_lock, "0.0.0.0", None)
    assert not (tmp_path / "metrics.json").exists()


def test_the_shipped_prometheus_reads_the_default_folder() -> None:
    text = (ROOT / "k8s" / "monitoring" / "prometheus.yml").read_text()
    assert f'files: ["{targets.DEFAULT}/*.json"]' in text
    assert targets.folder({}) == Path(targets.DEFAULT)
    assert targets.folder({targets.PLACE: ""}) is None
