"""Looking at every node of a cluster before a job is given to it: what is there, and how fast ranks talk.

`orchestrator.cluster.preflight` says what a node is found to be like; here Ray takes that to all nodes.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import Finding, Found
from orchestrator.cluster.topology import Node
from orchestrator.errors import ClusterError
from orchestrator.train import ray_session

_ALL_REDUCE_BYTES = 32 * 2**20
_ALL_REDUCE_REPEATS = 5
_SECONDS_TO_ANSWER = 60.0
_CLOCK_LOOKS = 5


@dataclass(frozen=True)
class AllReduce:
    """A small all-reduce over all nodes.

    Attributes:
        ranks: Processes that took part.
        backend: nccl or gloo.
        size_bytes: Bytes that each rank gave.
        seconds: Median of the repeats; None where it did not end.
    """

    ranks: int
    backend: str
    size_bytes: int
    seconds: float | None

    @property
    def bus_gigabytes_per_second(self) -> float | None:
        """10^9 bytes a second that the slowest link carried, as nccl-tests define bus bandwidth."""
        if not self.seconds:
            return None
        return 2 * (self.ranks - 1) / self.ranks * self.size_bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Examination:
    """What was found on a cluster.

    Attributes:
        nodes: What each node is like.
        all_reduce: How fast they talk; None with one rank.
        findings: What would go wrong, worst first.
    """

    nodes: tuple[Found, ...]
    all_reduce: AllReduce | None
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        measured = None
        if self.all_reduce:
            bandwidth = self.all_reduce.bus_gigabytes_per_second
            measured = {**asdict(self.all_reduce), "bus_gigabytes_per_second": bandwidth}
        return {
            "nodes": [asdict(node) for node in self.nodes],
            "all_reduce": measured,
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(address: str | None, storage: Path | None, note: Callable[[str], None]) -> Examination:
    """Look at every live node of a cluster, and let one rank of each GPU, or node, reduce a tensor.

    Args:
        address: Address of a Ray cluster; None starts a local Ray and ends it afterwards.
        storage: Folder that every node has to read and write; None looks at none.
        note: Told in a sentence how far it is.

    Raises:
        ClusterError: The cluster cannot be reached, or a node does not answer.
    """
    with ray_session.connected(address):
        nodes = ray_session.live_nodes()
        note(f"looking at {len(nodes)} node{'s' if len(nodes) > 1 else ''}")
        looking = [_actor(_Examiner, node) for node in nodes]
        found = _answers(
            nodes, [each.inspect.remote(node.address) for each, node in zip(looking, nodes, strict=True)]
        )
        found = [_with_skew(one, each) for one, each in zip(found, looking, strict=True)]
        if storage is not None:
            found = _with_storage(nodes, looking, found, storage)
        wants_gpus = any(node.gpus for node in nodes)
        findings = preflight.judge(found, wants_gpus)
        for each in looking:
            ray.kill(each)
        note("letting the nodes reduce a tensor")
        measured, problem = _all_reduce(nodes, wants_gpus)
        return Examination(tuple(found), measured, (*problem, *findings))


class _Examiner:
    """Looks at the node that it runs on."""

    def inspect(self, address: str) -> Found:
        return preflight.inspect(address)

    def now(self) -> float:
        return preflight.now()

    def mark(self, folder: Path, token: str, name: str) -> str | None:
        return preflight.mark(folder, token, name)

    def missing_marks(self, folder: Path, token: str, names: Sequence[str]) -> list[str]:
        return preflight.missing_marks(folder, token, names)

    def unmark(self, folder: Path, token: str, names: Sequence[str]) -> None:
        preflight.unmark(folder, token, names)


class _Rank:
    """One rank of the all-reduce."""

    def free_port(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def reduce(self, rank: int, ranks: int, where: str, on_gpu: bool) -> float:
        """Return the median seconds of an all-reduce."""
        from datetime import timedelta

        import torch
        from torch import distributed as dist

        device = torch.device("cuda" if on_gpu else "cpu")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{where}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=_SECONDS_TO_ANSWER),
        )  # fmt: skip
        try:
            tensor = torch.ones(_ALL_REDUCE_BYTES // 4, device=device)
            seconds = []
            for _ in range(_ALL_REDUCE_REPEATS + 2):
                dist.barrier()
                started = time.perf_counter()
                dist.all_reduce(tensor, op=dist.ReduceOp.AVG if on_gpu else dist.ReduceOp.MAX)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            return statistics.median(seconds[2:])
        finally:
            dist.destroy_process_group()


def _actor(of: type, node: Node, gpus: int = 0) -> Any:
    """Return an actor on a node, which takes no CPU there."""
    here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(of).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=here).remote()


def _answers(nodes: Sequence[Node], asked: Sequence[Any]) -> list[Any]:
    """Return what each node says.

    Raises:
        ClusterError: With every node that does not say anything in time.
    """
    answers, silent = [], []
    deadline = time.monotonic() + _SECONDS_TO_ANSWER
    for node, future in zip(nodes, asked, strict=True):
        try:
            answers.append(ray.get(future, timeout=max(0.1, deadline - time.monotonic())))
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            silent.append(f"{node.address} ({node.hostname}) does not answer ({reason}); see its Ray's logs")
    if silent:
        raise ClusterError(*silent)
    return answers


def _with_skew(one: Found, examiner: Any) -> Found:
    """Compare clocks; of several looks the one that took least time says most."""
    looks = []
    for _ in range(_CLOCK_LOOKS):
        before = preflight.now()
        theirs = ray.get(examiner.now.remote(), timeout=_SECONDS_TO_ANSWER)
        after = preflight.now()
        looks.append(((after - before) / 2, theirs - (after + before) / 2))
    error, skew = min(looks)
    return replace(one, skew_seconds=skew, skew_error_seconds=error)


def _with_storage(
    nodes: Sequence[Node], looking: Sequence[Any], found: Sequence[Found], storage: Path
) -> list[Found]:
    """Let every node write into the storage, and look for what the others, and the driver, wrote."""
    token, names = uuid.uuid4().hex[:8], [node.address for node in nodes]
    everyone = [*names, "driver"]
    own = preflight.mark(storage, token, "driver")
    marked = _answers(
        nodes, [each.mark.remote(storage, token, name) for each, name in zip(looking, names, strict=True)]
    )
    unseen = _answers(nodes, [each.missing_marks.remote(storage, token, everyone) for each in looking])
    _answers(nodes, [each.unmark.remote(storage, token, everyone) for each in looking])
    if own is None:
        preflight.unmark(storage, token, everyone)
    problems = []
    for problem, missed in zip(marked, unseen, strict=True):
        others = [name for name in missed if problem is None]
        said = f"does not show what {', '.join(others)} wrote" if others else None
        problems.append(f"{storage} {problem or said}" if problem or said else None)
    return [replace(one, storage_problem=problem) for one, problem in zip(found, problems, strict=True)]


def _all_reduce(nodes: Sequence[Node], on_gpu: bool) -> tuple[AllReduce | None, list[Finding]]:
    """Measure an all-reduce among all GPUs, or one process of each node."""
    homes = [node for node in nodes for _ in range(int(node.gpus) if on_gpu else 1)]
    if len(homes) < 2:
        return None, []
    backend = "nccl" if on_gpu else "gloo"
    ranks = [_actor(_Rank, node, gpus=int(on_gpu)) for node in homes]
    try:
        port = ray.get(ranks[0].free_port.remote(), timeout=_SECONDS_TO_ANSWER)
        where = f"{homes[0].address}:{port}"
        asked = [each.reduce.remote(rank, len(homes), where, on_gpu) for rank, each in enumerate(ranks)]
        seconds = max(ray.get(asked, timeout=2 * _SECONDS_TO_ANSWER))
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        problem = Finding(
            "problem",
            f"an all-reduce of {len(homes)} ranks over {backend} does not end ({reason}); see that nothing "
            "else holds the GPUs, that no firewall is between the nodes, and set NCCL_SOCKET_IFNAME or "
            "GLOO_SOCKET_IFNAME where they have several networks",
        )
        return AllReduce(len(homes), backend, _ALL_REDUCE_BYTES, None), [problem]
    finally:
        for each in ranks:
            ray.kill(each)
    return AllReduce(len(homes), backend, _ALL_REDUCE_BYTES, seconds), []
