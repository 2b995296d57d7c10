"""`orchestrator doctor`: preflight checks on every node of a Ray cluster, and an all-reduce benchmark.

Runs the checks of `orchestrator.cluster.preflight` in one actor per node.
"""

from __future__ import annotations

import logging
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import Diagnostic, NodeInfo
from orchestrator.cluster.topology import Node
from orchestrator.errors import ClusterError
from orchestrator.train import ray_session

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_ALL_REDUCE_BYTES = 32 * 2**20
_ALL_REDUCE_REPEATS = 5
_SECONDS_TO_ANSWER = 60.0
_CLOCK_SAMPLES = 5


@dataclass(frozen=True)
class AllReduce:
    """Result of the all-reduce benchmark.

    Attributes:
        ranks: World size.
        backend: nccl or gloo.
        size_bytes: Size of the reduced tensor in bytes.
        seconds: Median latency; None if the all-reduce failed or timed out.
    """

    ranks: int
    backend: str
    size_bytes: int
    seconds: float | None

    @property
    def bus_gigabytes_per_second(self) -> float | None:
        """Bus bandwidth in 10^9 bytes per second, as defined by nccl-tests."""
        if not self.seconds:
            return None
        return 2 * (self.ranks - 1) / self.ranks * self.size_bytes / self.seconds / 1e9


@dataclass(frozen=True)
class ClusterReport:
    """Result of `orchestrator doctor`.

    Attributes:
        nodes: Information about each node.
        all_reduce: Result of the all-reduce benchmark; None with one rank.
        diagnostics: Problems, then warnings.
    """

    nodes: tuple[NodeInfo, ...]
    all_reduce: AllReduce | None
    diagnostics: tuple[Diagnostic, ...]

    def as_json(self) -> dict[str, object]:
        """Return the report as JSON-serializable values."""
        measured = None
        if self.all_reduce:
            bandwidth = self.all_reduce.bus_gigabytes_per_second
            measured = {**asdict(self.all_reduce), "bus_gigabytes_per_second": bandwidth}
        return {
            "nodes": [asdict(node) for node in self.nodes],
            "all_reduce": measured,
            "findings": [asdict(diagnostic) for diagnostic in self.diagnostics],
        }


def diagnose_cluster(address: str | None, storage: Path | None) -> ClusterReport:
    """Run the preflight checks on every live node, and an all-reduce over all GPUs, or all nodes on CPU.

    Args:
        address: Address of a Ray cluster; None starts a local Ray and stops it afterwards.
        storage: Folder that every node must be able to read and write; None skips this check.

    Raises:
        ClusterError: The cluster cannot be reached, or a node does not respond.
    """
    with ray_session.connected(address):
        nodes = ray_session.live_nodes()
        _logger.info(f"checking {len(nodes)} node{'s' if len(nodes) > 1 else ''}")
        probes = [_actor(_NodeProbe, node) for node in nodes]
        infos: list[NodeInfo] = _gather(
            nodes,
            [probe.collect_node_info.remote(node.address) for probe, node in zip(probes, nodes, strict=True)],
        )
        infos = [_with_skew(info, probe) for info, probe in zip(infos, probes, strict=True)]
        if storage is not None:
            infos = _with_storage(nodes, probes, infos, storage)
        expect_gpus = any(node.gpus for node in nodes)
        diagnostics = preflight.diagnose(infos, expect_gpus)
        for probe in probes:
            ray.kill(probe)
        _logger.info("running an all-reduce over all nodes")
        all_reduce, problems = _all_reduce(nodes, expect_gpus)
        return ClusterReport(tuple(infos), all_reduce, (*problems, *diagnostics))


class _NodeProbe:
    """Runs the preflight functions on the node of its actor."""

    def collect_node_info(self, address: str) -> NodeInfo:
        return preflight.collect_node_info(address)

    def now(self) -> float:
        return preflight.now()

    def write_marker(self, folder: Path, token: str, name: str) -> str | None:
        return preflight.write_marker(folder, token, name)

    def missing_markers(self, folder: Path, token: str, names: Sequence[str]) -> list[str]:
        return preflight.missing_markers(folder, token, names)

    def remove_markers(self, folder: Path, token: str, names: Sequence[str]) -> None:
        preflight.remove_markers(folder, token, names)


class _Rank:
    """One rank of the all-reduce."""

    def free_port(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def reduce(self, rank: int, world_size: int, master: str, on_gpu: bool) -> float:
        """Return the median latency of an all-reduce in seconds."""
        from datetime import timedelta

        import torch
        from torch import distributed as dist

        device = torch.device("cuda" if on_gpu else "cpu")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{master}", rank=rank, world_size=world_size,
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


def _actor(actor_class: type, node: Node, gpus: int = 0) -> Any:
    """Start an actor on a node; it reserves no CPU."""
    affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(actor_class).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=affinity).remote()


def _gather(nodes: Sequence[Node], futures: Sequence[ray.ObjectRef[_T]]) -> list[_T]:
    """Return the result of each node's future.

    Raises:
        ClusterError: With every node that failed or did not respond in time.
    """
    results, problems = [], []
    deadline = time.monotonic() + _SECONDS_TO_ANSWER
    for node, future in zip(nodes, futures, strict=True):
        try:
            results.append(ray.get(future, timeout=max(0.1, deadline - time.monotonic())))
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problems.append(
                f"{node.address} ({node.hostname}) does not respond ({reason}); see Ray's logs on that node"
            )
    if problems:
        raise ClusterError(*problems)
    return results


def _with_skew(info: NodeInfo, probe: Any) -> NodeInfo:
    """Add the clock offset to the driver: of several samples, the one with the shortest round trip."""
    samples = []
    for _ in range(_CLOCK_SAMPLES):
        before = preflight.now()
        remote = ray.get(probe.now.remote(), timeout=_SECONDS_TO_ANSWER)
        after = preflight.now()
        samples.append(((after - before) / 2, remote - (after + before) / 2))
    error, skew = min(samples)
    return replace(info, skew_seconds=skew, skew_error_seconds=error)


def _with_storage(
    nodes: Sequence[Node], probes: Sequence[Any], infos: Sequence[NodeInfo], storage: Path
) -> list[NodeInfo]:
    """Check shared storage: every node writes a marker and looks for those of the others and the driver."""
    token, names = uuid.uuid4().hex[:8], [node.address for node in nodes]
    writers = [*names, "driver"]
    driver_error = preflight.write_marker(storage, token, "driver")
    errors = _gather(
        nodes,
        [probe.write_marker.remote(storage, token, name) for probe, name in zip(probes, names, strict=True)],
    )
    missing = _gather(nodes, [probe.missing_markers.remote(storage, token, writers) for probe in probes])
    _gather(nodes, [probe.remove_markers.remote(storage, token, writers) for probe in probes])
    if driver_error is None:
        preflight.remove_markers(storage, token, writers)
    problems: list[str | None] = []
    for error, unseen in zip(errors, missing, strict=True):
        problem = error or (f"does not show files written by {', '.join(unseen)}" if unseen else None)
        problems.append(f"{storage} {problem}" if problem else None)
    return [replace(info, storage_problem=problem) for info, problem in zip(infos, problems, strict=True)]


def _all_reduce(nodes: Sequence[Node], on_gpu: bool) -> tuple[AllReduce | None, list[Diagnostic]]:
    """Time an all-reduce with one rank per GPU, or one per node on CPU."""
    rank_nodes = [node for node in nodes for _ in range(int(node.gpus) if on_gpu else 1)]
    world_size = len(rank_nodes)
    if world_size < 2:
        return None, []
    backend = "nccl" if on_gpu else "gloo"
    ranks = [_actor(_Rank, node, gpus=int(on_gpu)) for node in rank_nodes]
    try:
        port = ray.get(ranks[0].free_port.remote(), timeout=_SECONDS_TO_ANSWER)
        master = f"{rank_nodes[0].address}:{port}"
        futures = [actor.reduce.remote(rank, world_size, master, on_gpu) for rank, actor in enumerate(ranks)]
        seconds = max(ray.get(futures, timeout=2 * _SECONDS_TO_ANSWER))
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        problem = Diagnostic(
            "problem",
            f"an all-reduce of {world_size} ranks over {backend} did not finish ({reason}); check that no "
            "other process holds the GPUs and that no firewall separates the nodes, and set "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME if the nodes have several networks",
        )
        return AllReduce(world_size, backend, _ALL_REDUCE_BYTES, None), [problem]
    finally:
        for actor in ranks:
            ray.kill(actor)
    return AllReduce(world_size, backend, _ALL_REDUCE_BYTES, seconds), []
