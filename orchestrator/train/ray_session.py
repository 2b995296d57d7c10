"""Connects to a Ray cluster, or starts and stops a local Ray."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from orchestrator.cluster.auth import choose_auth_mode
from orchestrator.cluster.topology import Node
from orchestrator.errors import OrchestratorError
from orchestrator.train import ray_connection

_T = TypeVar("_T")


@contextmanager
def connected(address: str | None, names: Iterable[str] = ()) -> Iterator[None]:
    """Connect to a cluster, or start a local Ray that is stopped at the end of the context.

    Args:
        address: Address of a cluster, or auto; None uses RAY_ADDRESS if it is set, else a local Ray.
        names: Environment variables forwarded to tasks and workers in addition to the default ones.

    Raises:
        ClusterError: The cluster cannot be reached, or a local Ray cannot be started.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    choose_auth_mode()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    try:
        ray_connection.require_listener(address)
        ray.init(**ray_connection.init_arguments(address, names))
    except Exception as error:  # Ray raises a plain Exception if a node does not start in time
        raise ray_connection.unreachable(address, error) from None
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    try:
        yield
    finally:
        ray.shutdown()


def live_nodes() -> tuple[Node, ...]:
    """Return the live nodes; if an address is listed more than once after a restart, the latest."""
    nodes = {
        record["NodeManagerAddress"]: Node(
            node_id=record["NodeID"],
            address=record["NodeManagerAddress"],
            hostname=record["NodeManagerHostname"],
            cpus=record["Resources"].get("CPU", 0.0),
            gpus=record["Resources"].get("GPU", 0.0),
            memory_bytes=int(record["Resources"].get("memory", 0)),
        )
        for record in ray.nodes()
        if record["Alive"]
    }
    return tuple(nodes.values())


def get_result(reference: ray.ObjectRef[_T]) -> _T:
    """Return the result of a Ray task or actor call; an `OrchestratorError` is raised as itself.

    Args:
        reference: An `ObjectRef`.

    Raises:
        RayTaskError: The task raised any other exception.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise
