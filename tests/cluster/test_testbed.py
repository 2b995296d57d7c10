"""The testbed: real nodes start, die when killed, and leave nothing behind."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.support import netns
from tests.support.testbed import Testbed, TestbedError, unavailable_reason

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _available() -> None:
    if reason := unavailable_reason():
        pytest.skip(f"no testbed: {reason}")


@pytest.fixture
def network() -> Iterator[netns.Network]:
    network = netns.claim()
    try:
        network.create(2)
        yield network
    finally:
        network.remove()
        network.release()


def states(dashboard_url: str) -> dict[str, str]:
    """Return node states from the dashboard instead of the testbed."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{dashboard_url}/api/v0/nodes?detail=1", timeout=10) as reply:
        records = json.load(reply)["data"]["result"]["result"]
    return {record["node_ip"]: record["state"] for record in records}


def leftovers(network: netns.Network) -> list[str]:
    """Return namespaces, links and files of a testbed that still exist on this machine."""
    name = f"rtb{network.slot}"
    found = [line for line in netns.ip("netns", "list").splitlines() if line.startswith(f"{name}n")]
    found += [line for line in netns.ip("-o", "link").splitlines() if f" {name}" in line]
    paths = [network.directory, Path(f"/run/{name}.lock"), *Path("/etc").glob(f"netns/{name}n*")]
    return found + [str(path) for path in paths if path.exists()]


def test_a_node_dies_and_restarts_and_nothing_is_left() -> None:
    with Testbed(nodes=2, cpus_per_node=1, env={"TESTBED_MARK": "seen"}) as testbed:
        network = testbed._up()
        first, second = testbed.addresses
        assert states(testbed.dashboard_url) == {first: "ALIVE", second: "ALIVE"}
        assert [(node.address, node.cpus, node.alive) for node in testbed.nodes()] == [
            (first, 1.0, True),
            (second, 1.0, True),
        ]
        pids = testbed.pids(0) + testbed.pids(1)
        code = "import os, socket as s; print(s.gethostbyname(s.gethostname()), os.environ['TESTBED_MARK'])"
        with testbed.run(1, ["python", "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.communicate(timeout=20)[0] == f"{second} seen\n"

        testbed.kill(1)
        assert testbed.pids(1) == []
        deadline = time.monotonic() + 40
        while states(testbed.dashboard_url)[second] != "DEAD":
            assert time.monotonic() < deadline, "the head did not notice the dead node within 40 s"
            time.sleep(0.5)
        assert states(testbed.dashboard_url)[first] == "ALIVE"

        testbed.start(1)
        lives = [node.alive for node in testbed.nodes() if node.address == second]
        assert lives == [True, False]
        pids += testbed.pids(1)

    assert leftovers(network) == []
    assert [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()] == []
    with pytest.raises(TestbedError, match="not running"):
        _ = testbed.dashboard_url


def test_nodes_reach_each_other_by_name_until_the_link_is_cut(network: netns.Network) -> None:
    with subprocess.Popen(netns.inside(network.namespace(1), ["sleep", "60"])) as process:
        wait_until(lambda: network.pids(1) == [process.pid], 10, "the process is in its namespace")
        assert network.pids(0) == []
        assert connects(network)
        network.set_link(1, "down")
        assert not connects(network)
        network.set_link(1, "up")
        assert connects(network)
        network.kill(1)
        assert process.wait(timeout=5) == -signal.SIGKILL


def connects(network: netns.Network) -> bool:
    """Return whether node 0 gets a response from node 1, even a refused connection."""
    code = (
        "import socket, sys; s = socket.socket(); "
        f"s.settimeout(2);sys.exit({{0: 0, 111: 0}}.get(s.connect_ex(({network.namespace(1)!r}, 9)), 1))"
    )
    argv = netns.inside(network.namespace(0), [sys.executable, "-c", code])
    return subprocess.run(argv, check=False, timeout=20).returncode == 0


def test_two_networks_coexist(network: netns.Network) -> None:
    other = netns.claim()
    try:
        assert other.slot != network.slot
        assert not other.subnet.overlaps(network.subnet)
        other.create(1)
        assert network.pids(0) == []
    finally:
        other.remove()
        other.release()
    assert leftovers(other) == []
    assert leftovers(network) != []


def test_leftovers_of_a_crashed_owner_are_removed() -> None:
    code = (
        "import subprocess, signal; from tests.support import netns; network = "
        "netns.claim();network.create(1);process = subprocess.Popen(netns.inside(network.namespace(0), "
        "['sleep', '600']));print(network.slot, process.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        slot, pid = map(int, owner.stdout.readline().split())
        owner.kill()
    assert Path(f"/proc/{pid}/exe").exists()

    network = netns.claim()
    network.release()
    assert leftovers(network) == []
    assert f"rtb{slot}n0" not in netns.ip("netns", "list")
    assert not Path(f"/proc/{pid}/exe").exists()


def test_a_failed_start_is_reported_with_its_log() -> None:
    testbed = Testbed(nodes=1, env={"PYTHONHOME": "/nowhere"})
    with pytest.raises(TestbedError, match=r"`ray start` on node 0 ended with status 1; the end of its log:"):
        testbed.__enter__()
    with pytest.raises(TestbedError, match="not running"):
        testbed.pids(0)


@pytest.mark.parametrize("nodes", [0, 33])
def test_the_number_of_nodes_is_limited(nodes: int) -> None:
    with pytest.raises(TestbedError, match=f"nodes={nodes}; a testbed has 1 to 32 nodes"):
        Testbed(nodes=nodes)


def test_the_shell_command_stops_cleanly_on_a_signal() -> None:
    argv = [sys.executable, "-m", "tests.support.testbed", "up", "--nodes", "1", "--cpus-per-node", "1"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(4)]
        finally:
            process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert lines[0].startswith("dashboard http://")
    assert lines[3].startswith("up;")
    address = lines[2].split()[-1]
    assert address not in netns.ip("-4", "route", "show", "table", "all")
