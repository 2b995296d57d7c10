"""Network namespaces on one bridge: the nodes of a testbed without Ray.

Every testbed takes a slot, a small number from which all its names follow: namespaces ``rtb<slot>n<k>``, host
ends of the links ``rtb<slot>v<k>``, bridge ``rtb<slot>br``, directory ``/tmp/rtb<slot>``. A file lock, which
the kernel drops with its owner, says whether a slot is taken: what a crashed owner left can be told from what
is in use, and the next testbed clears it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NODES = 32
_SLOTS = 64
_LOCKS = Path("/run")
# Not tempfile.gettempdir(): Ray creates sockets with paths about 70 characters longer; AF_UNIX allows 107.
_DIRECTORIES = Path("/tmp")
_HOSTS = Path("/etc/netns")
# Private ranges first; the last one is reserved for benchmarks by RFC 2544.
_RANGES = ("10.77", "10.143", "10.209", "172.29", "198.18")
# Sets the hostname in the new UTS namespace, then execs the command to keep the PID.
_BECOME = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


class TestbedError(RuntimeError):
    """An operation of the testbed failed."""

    __test__ = False  # the name looks like a test class to pytest


def ip(*arguments: str) -> str:
    """Run iproute2's ``ip`` and return its output.

    Raises:
        TestbedError: The command is missing, fails, or takes longer than 30 seconds.
    """
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except subprocess.CalledProcessError as error:
        raise TestbedError(f"`ip {' '.join(arguments)}` failed: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TestbedError(f"`ip {' '.join(arguments)}` could not run: {error}") from error
    return done.stdout


def inside(namespace: str, argv: Sequence[str]) -> list[str]:
    """Return a command line that runs a command in a namespace; its name is also the hostname."""
    prefix = [_path("ip"), "netns", "exec", namespace, _path("unshare"), "--uts"]
    return [*prefix, sys.executable, "-I", "-S", "-c", _BECOME, namespace, *argv]


def unavailable_reason() -> str | None:
    """Return why namespaces cannot be used on this machine, or None if creating one succeeded."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"network namespaces need root, this is user id {os.geteuid()}"
    for command in ("ip", "unshare"):
        if shutil.which(command) is None:
            return f"the command `{command}` is not on PATH; install iproute2 and util-linux"
    name = f"rtbt{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", name, "type", "bridge")
        ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
        subprocess.run(inside(name, ["true"]), capture_output=True, text=True, check=True, timeout=30)
    except TestbedError as error:
        return f"a trial namespace cannot be set up: {error}"
    except subprocess.CalledProcessError as error:
        return f"a process cannot run in a trial namespace: {error.stderr.strip()}"
    except subprocess.TimeoutExpired as error:
        return f"a process cannot run in a trial namespace: {error}"
    finally:
        for arguments in (("link", "del", f"{name}v"), ("link", "del", name), ("netns", "del", name)):
            with contextlib.suppress(TestbedError):
                ip(*arguments)
    return None


@dataclass(frozen=True, slots=True)
class Network:
    """The namespaces, links, addresses and directories of one testbed; hold it from `claim` to `release`."""

    slot: int
    subnet: IPv4Network
    lock: int

    @property
    def bridge(self) -> str:
        """Name of the bridge of all nodes; the host has the first address of the subnet."""
        return f"rtb{self.slot}br"

    @property
    def directory(self) -> Path:
        """Directory for files of the nodes, with a short path."""
        return _DIRECTORIES / f"rtb{self.slot}"

    def namespace(self, k: int) -> str:
        """Return the name of node k: its namespace and hostname."""
        return f"rtb{self.slot}n{k}"

    def address(self, k: int) -> str:
        """Return the IP address of node k."""
        return str(self.subnet[10 + k])

    def create(self, nodes: int) -> None:
        """Create the bridge and one namespace per node; nodes resolve each other by name.

        Raises:
            TestbedError: A command of iproute2 fails, or a file cannot be written.
        """
        gateway = str(self.subnet[1])
        try:
            self.directory.mkdir(mode=0o755)
            ip("link", "add", self.bridge, "type", "bridge")
            ip("addr", "add", f"{gateway}/{self.subnet.prefixlen}", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            lines = ["127.0.0.1 localhost", *(f"{self.address(k)} {self.namespace(k)}" for k in range(nodes))]
            for k in range(nodes):
                self._create_node(k, gateway)
                hosts = _HOSTS / self.namespace(k)
                hosts.mkdir(parents=True)
                (hosts / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise TestbedError(f"the files of {self.directory.name} cannot be written: {error}") from error

    def _create_node(self, k: int, gateway: str) -> None:
        name = self.namespace(k)
        ip("netns", "add", name)
        ip("link", "add", self._link(k), "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", self._link(k), "master", self.bridge, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "addr", "add", f"{self.address(k)}/{self.subnet.prefixlen}", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        # Libraries determine the address of a node from its default route; nothing is forwarded.
        ip("-n", name, "route", "add", "default", "via", gateway)

    def set_link(self, k: int, state: str) -> None:
        """Take the link of node k ``down``, so that packets vanish silently, or ``up`` again."""
        ip("link", "set", self._link(k), state)

    def pids(self, k: int) -> list[int]:
        """Return the PIDs of all processes in node k."""
        return [int(pid) for pid in ip("netns", "pids", self.namespace(k)).split()]

    def kill(self, k: int, timeout_seconds: float = 20.0) -> None:
        """Kill all processes in node k with SIGKILL and wait until none is left.

        Raises:
            TestbedError: Processes are left after the timeout.
        """
        _kill(self.namespace(k), timeout_seconds)

    def remove(self) -> None:
        """Kill all processes and remove namespaces, links and files of this slot; safe to repeat.

        Raises:
            TestbedError: Something cannot be removed.
        """
        for name in self._namespaces():
            _kill(name, timeout_seconds=20.0)
        for name in self._links():
            # Remove links by name: the kernel deletes those of a namespace only some time later.
            ip("link", "del", name)
        for name in self._namespaces():
            ip("netns", "del", name)
        for hosts in _HOSTS.glob(f"rtb{self.slot}n*"):
            shutil.rmtree(hosts, ignore_errors=True)
        with contextlib.suppress(OSError):
            _HOSTS.rmdir()  # ours if empty
        shutil.rmtree(self.directory, ignore_errors=True)

    def release(self) -> None:
        """Release the slot."""
        _lock_path(self.slot).unlink(missing_ok=True)
        os.close(self.lock)

    def _link(self, k: int) -> str:
        return f"rtb{self.slot}v{k}"

    def _namespaces(self) -> list[str]:
        return re.findall(rf"^(rtb{self.slot}n\d+)\b", ip("netns", "list"), re.MULTILINE)

    def _links(self) -> list[str]:
        return re.findall(rf"^\d+: (rtb{self.slot}(?:v\d+|br))[@:]", ip("-o", "link", "show"), re.MULTILINE)


def claim() -> Network:
    """Remove leftovers of crashed owners, take a free slot, and choose an unused subnet.

    Raises:
        TestbedError: All slots or subnets are taken, or what was left cannot be cleared.
    """
    for path in _LOCKS.glob("rtb*.lock"):
        if (left := _take(int(path.stem.removeprefix("rtb")))) is not None:
            left.release()
    for slot in range(_SLOTS):
        if (network := _take(slot)) is None:
            continue
        try:
            return replace(network, subnet=_free_subnet(slot))
        except BaseException:
            network.release()
            raise
    raise TestbedError(
        f"all {_SLOTS} slots ({_lock_path(0)} and following) are in use; close a testbed first"
    )


def _take(slot: int) -> Network | None:
    lock = _lock(slot)
    if lock is None:
        return None
    network = Network(slot, IPv4Network("0.0.0.0/0"), lock)
    try:
        network.remove()
    except BaseException:
        os.close(lock)
        raise
    return network


def _lock_path(slot: int) -> Path:
    return _LOCKS / f"rtb{slot}.lock"


def _lock(slot: int) -> int | None:
    path = _lock_path(slot)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An owner removes the file before it releases the lock, so the locked file may be unlinked.
        if os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _free_subnet(slot: int) -> IPv4Network:
    taken = _networks_in_use()
    for start in _RANGES:
        subnet = IPv4Network(f"{start}.{slot}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    tried = ", ".join(f"{start}.{slot}.0/24" for start in _RANGES)
    raise TestbedError(f"every subnet tried ({tried}) overlaps a route of this host; free one of them")


def _networks_in_use() -> list[IPv4Network]:
    words = ip("-4", "-o", "addr", "show").split() + ip("-4", "route", "show", "table", "all").split()
    found = []
    for word in words:
        with contextlib.suppress(ValueError):
            found.append(IPv4Network(word, strict=False))
    return [network for network in found if network.network_address != IPv4Address("0.0.0.0")]


def _kill(namespace: str, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    # Repeatedly: a process may fork between listing and signal.
    while pids := [int(pid) for pid in ip("netns", "pids", namespace).split()]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TestbedError(
                f"processes {pids} of {namespace} are left {timeout_seconds:g} s after SIGKILL; see in /proc"
                f" what they wait on, then close again"
            )
        time.sleep(0.05)


def _path(command: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise TestbedError(f"the command `{command}` is not on PATH; install iproute2 and util-linux")
    return found
