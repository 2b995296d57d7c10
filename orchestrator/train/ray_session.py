"""Being a driver of a Ray cluster, or of a local Ray that is started and ended here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestrator.cluster.auth import choose_auth_mode
from orchestrator.cluster.topology import Node
from orchestrator.errors import OrchestratorError
from orchestrator.train import ray_connection


@contextmanager
def connected(address: str | None, names: Iterable[str] = ()) -> Iterator[None]:
    """Be a driver of the cluster at an address, or of a local Ray that lives as long as this.

    Args:
        address: Address of a cluster, or auto; None takes RAY_ADDRESS from the environment, where it is set.
        names: Environment variables that reach tasks and workers besides the default ones.

    Raises:
        ClusterError: The cluster cannot be reached, or a local Ray cannot be started.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    choose_auth_mode()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    try:
        ray_connection.require_listener(address)
        ray.init(**ray_connection.init_arguments(address, names))
    except Exception as error:  # where a node does not come up in time, Ray raises just that
        raise ray_connection.unreachable(address, error) from None
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    try:
        yield
    finally:
        ray.shutdown()


def live_nodes() -> tuple[Node, ...]:
    """Return the live nodes; where Ray still lists an earlier life of an address, the later one counts."""
    found = {
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
    return tuple(found.values())


def get_result(reference: Any) -> Any:
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
