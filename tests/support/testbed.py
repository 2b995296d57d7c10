"""Several real Ray nodes on one machine, each in its own network namespace, for tests.

Every node has its own address, link and hostname, so a crash or a cut cable can be staged without a second
machine. Needs root, iproute2, util-linux and Ray. From a shell: ``python -m tests.support.testbed up --nodes
2``.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from orchestrator.cluster.topology import from_state_api
from tests.support import netns
from tests.support.netns import TestbedError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from types import FrameType

    from orchestrator.cluster.topology import Node

__all__ = ["Testbed", "TestbedError", "unavailable_reason"]

OBJECT_STORE_BYTES = 100_000_000
START_TIMEOUT_SECONDS = 120.0
_GCS_PORT, _DASHBOARD_PORT, _METRICS_PORT = 6379, 8265, 8080


def unavailable_reason() -> str | None:
    """Return why testbeds cannot run on this machine, or None; for ``pytest.skip``."""
    if not _ray().exists():
        return f"{_ray()} does not exist; install ray[default] into the environment of this interpreter"
    return netns.unavailable_reason()


class Testbed:
    """A Ray cluster of several nodes on this machine; a context manager that cleans up after itself.

    Node 0 is the head. Leftovers of a crashed testbed are removed by the next one in its slot.

    Attributes:
        dashboard_url: URL of the dashboard and job server, reachable from this machine.
        gcs_address: Address of the cluster for ``ray.init`` inside a node.
        addresses: IP addresses of the nodes, head first.
    """

    __test__ = False  # the name looks like a test class to pytest

    def __init__(
        self,
        nodes: int = 2,
        cpus_per_node: int = 2,
        gpus_per_node: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Configure a testbed; it starts when the context is entered.

        Args:
            nodes: Number of Ray nodes including the head.
            cpus_per_node: Logical CPUs per node.
            gpus_per_node: Logical GPUs per node, independent of real ones.
            env: Additional environment of the nodes and their workers, such as PYTHONPATH. The caller's
                environment is inherited except RAY_*; add those here.

        Raises:
            TestbedError: The number of nodes is out of range.
        """
        if not 1 <= nodes <= netns.MAX_NODES:
            raise TestbedError(f"nodes={nodes}; a testbed has 1 to {netns.MAX_NODES} nodes")
        self._count = nodes
        self._resources = [f"--num-cpus={cpus_per_node}", f"--num-gpus={gpus_per_node}"]
        self._extra_env = dict(env or {})
        self._network: netns.Network | None = None
        self._running: list[subprocess.Popen[Any]] = []
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        """Create the namespaces, start Ray in each, and wait until the head lists all nodes as alive.

        Raises:
            TestbedError: The testbed is up already, namespaces cannot be made, or a node does not start.
        """
        if self._network is not None:
            raise TestbedError("this testbed is already running; create another one for a second cluster")
        self._network = netns.claim()
        self._owner = os.getpid()
        atexit.register(self.close)
        try:
            self._network.create(self._count)
            self._finish(0, self._launch(0))
            # Start workers concurrently: each mostly waits.
            starting = {k: self._launch(k) for k in range(1, self._count)}
            for k, process in starting.items():
                self._finish(k, process)
            self._await_alive(set(self.addresses))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the testbed."""
        self.close()

    @property
    def gcs_address(self) -> str:
        """Address of the cluster, ``host:port``, for ``ray.init`` inside a node."""
        return f"{self._up().address(0)}:{_GCS_PORT}"

    @property
    def dashboard_url(self) -> str:
        """URL of the dashboard and job server."""
        return f"http://{self._up().address(0)}:{_DASHBOARD_PORT}"

    @property
    def addresses(self) -> list[str]:
        """IP addresses of the nodes, head first."""
        return [self._up().address(k) for k in range(self._count)]

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes as listed by the head; a restarted node is listed once per start.

        Raises:
            TestbedError: The dashboard does not answer.
        """
        url = f"{self.dashboard_url}/api/v0/nodes?detail=1&limit=1000"
        request = urllib.request.Request(url)
        if token := self._extra_env.get("RAY_AUTH_TOKEN"):
            request.add_header("Authorization", f"Bearer {token}")
        # Without proxies: the addresses only exist on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as reply:
                return from_state_api(json.load(reply)["data"]["result"]["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TestbedError(f"the dashboard at {url} does not list nodes: {error!r}") from error

    def kill(self, k: int) -> None:
        """Crash node k: SIGKILL for every process. The head reports DEAD about 13 seconds later."""
        self._node(k).kill(k)

    def partition(self, k: int) -> None:
        """Disconnect node k silently. The head reports DEAD up to a minute later."""
        self._node(k).set_link(k, "down")

    def heal(self, k: int) -> None:
        """Reconnect node k. After a long partition its Ray has exited and must be restarted."""
        self._node(k).set_link(k, "up")

    def start(self, k: int) -> None:
        """Kill remaining processes on node k, restart Ray, and wait until the head lists it as alive.

        The head takes its cluster along: ``start(0)`` ends all other nodes, which must be started, too.

        Raises:
            TestbedError: Ray does not start; the message ends with the node's log.
        """
        network = self._node(k)
        # A new head does not start while any process on this machine has the address of the old one.
        for ending in range(self._count) if k == 0 else [k]:
            network.kill(ending)
        network.set_link(k, "up")
        # For some seconds the head still lists the killed node as alive, with the same address.
        ended: set[str] = set()
        with contextlib.suppress(TestbedError):  # the dashboard is down when the head itself is restarted
            ended = {node.node_id for node in self.nodes() if node.address == network.address(k)}
        self._finish(k, self._launch(k))
        self._await_alive({network.address(k)}, ended)

    def pids(self, k: int) -> list[int]:
        """Return the PIDs of all processes in node k."""
        return self._node(k).pids(k)

    def run(self, k: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process inside node k in the node's environment, with RAY_ADDRESS set to this cluster.

        Args:
            k: The node.
            argv: Command and arguments; the command is looked up in the folder of the interpreter first.
            popen: Passed on to ``subprocess.Popen``; ``env`` is added to the node's environment.

        Returns:
            The running process, whose id is the command's own. It ends with the node.
        """
        network = self._node(k)
        address = {"RAY_ADDRESS": self.gcs_address, "RAY_API_SERVER_ADDRESS": self.dashboard_url}
        env = self._env() | address | dict(popen.pop("env", None) or {})
        process = subprocess.Popen(netns.inside(network.namespace(k), argv), env=env, **popen)
        self._running.append(process)
        return process

    def close(self) -> None:
        """Kill all processes and remove namespaces, links and files; safe to repeat.

        Raises:
            TestbedError: Something cannot be removed. The next testbed tries again.
        """
        network = self._network
        if (
            network is None or os.getpid() != self._owner
        ):  # a forked child must not close the testbed of its parent
            return
        network.remove()
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        network.release()
        self._network = None
        self._running.clear()
        atexit.unregister(self.close)

    def _up(self) -> netns.Network:
        if self._network is None:
            raise TestbedError("this testbed is not running; use it inside `with Testbed(...) as testbed:`")
        return self._network

    def _node(self, k: int) -> netns.Network:
        if not 0 <= k < self._count:
            raise TestbedError(f"node {k} does not exist; this testbed has nodes 0 to {self._count - 1}")
        return self._up()

    def _env(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        local = ",".join(["localhost", "127.0.0.1", *self.addresses])
        return inherited | {
            "PATH": f"{_ray().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            # If unset, a plain ray.init() elsewhere on the machine enables token authentication here as well.
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            # gRPC's built-in resolver does not read the hosts file of a namespace.
            "GRPC_DNS_RESOLVER": "native",
            "NO_PROXY": local,
            "no_proxy": local,
            **self._extra_env,
        }

    def _log(self, k: int) -> Path:
        return self._up().directory / f"{k}.log"

    def _launch(self, k: int) -> subprocess.Popen[Any]:
        network = self._up()
        role = [f"--address={self.gcs_address}"]
        if k == 0:
            dashboard = [f"--dashboard-host={network.address(0)}", f"--dashboard-port={_DASHBOARD_PORT}"]
            role = ["--head", f"--port={_GCS_PORT}", *dashboard]
        argv = [
            *(str(_ray()), "start", *role, *self._resources),
            f"--node-name={network.namespace(k)}",
            f"--node-ip-address={network.address(k)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={network.directory / str(k)}",
            f"--metrics-export-port={_METRICS_PORT}",
            "--disable-usage-stats",
        ]
        with self._log(k).open("w", encoding="utf-8") as log:
            process: subprocess.Popen[Any] = subprocess.Popen(
                netns.inside(network.namespace(k), argv),
                env=self._env(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C only reaches this process, which stops the nodes
            )
        self._running.append(process)
        return process

    def _finish(self, k: int, process: subprocess.Popen[Any]) -> None:
        try:
            status = process.wait(timeout=START_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise TestbedError(
                f"`ray start` on node {k} took longer than {START_TIMEOUT_SECONDS:g} s; {self._tail(k)}"
            ) from None
        if status != 0:
            raise TestbedError(f"`ray start` on node {k} ended with status {status}; {self._tail(k)}")

    def _tail(self, k: int) -> str:
        lines = self._log(k).read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        return "the end of its log:\n" + "\n".join(lines)

    def _await_alive(self, addresses: set[str], ended: Collection[str] = ()) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            state = "the dashboard does not answer"
            with contextlib.suppress(TestbedError):  # the dashboard starts a little later than the head
                alive = {node.address for node in self.nodes() if node.alive and node.node_id not in ended}
                late = addresses - alive
                if not late:
                    return
                state = f"the head does not count {', '.join(sorted(late))} as alive"
            if time.monotonic() > deadline:
                raise TestbedError(f"{state} after {START_TIMEOUT_SECONDS:g} s; {self._tail(0)}")
            time.sleep(0.25)


def _ray() -> Path:
    return Path(sys.executable).with_name("ray")


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a testbed until Ctrl-C or SIGTERM; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tests.support.testbed", description="Ray in network namespaces."
    )
    parser.add_argument("command", choices=["up"], help="bring a testbed up and keep it until Ctrl-C")
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes, the head included")
    parser.add_argument("--cpus-per-node", type=int, default=2)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    arguments = parser.parse_args(argv)
    if reason := unavailable_reason():
        sys.stderr.write(f"no testbed on this machine: {reason}\n")
        return 3
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        with Testbed(arguments.nodes, arguments.cpus_per_node, arguments.gpus_per_node) as testbed:
            lines = [f"dashboard {testbed.dashboard_url}", f"gcs       {testbed.gcs_address}"]
            lines += [f"node {k}    {address}" for k, address in enumerate(testbed.addresses)]
            sys.stdout.write("\n".join([*lines, "up; Ctrl-C ends it", ""]))
            sys.stdout.flush()
            signal.pause()
    except TestbedError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
