"""Nodes of a cluster as plain values, and their conversion from Ray's state API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the cluster with its total resources.

    Attributes:
        node_id: Ray's node ID; a restarted node gets a new one.
        address: IP address by which other nodes reach it.
        hostname: Name of the node.
        cpus: Logical CPUs; may be fractional.
        gpus: Logical GPUs.
        memory_bytes: Host memory that Ray schedules, in bytes.
        alive: Whether Ray considers the node alive.
    """

    node_id: str
    address: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    alive: bool = True


def from_state_api(records: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Convert node records of Ray's state API to nodes, live ones first, then by address.

    Args:
        records: Node records of ``GET /api/v0/nodes?detail=1``. The hostname is ``node_name``, which is the
            address unless the node was started with ``ray start --node-name``.

    Raises:
        KeyError: A record lacks ``node_id``, ``node_ip`` or ``state``.
    """
    nodes = [_node(record) for record in records]
    return tuple(sorted(nodes, key=lambda node: (not node.alive, node.address, node.node_id)))


def _node(record: Mapping[str, Any]) -> Node:
    # Ray omits the resources of dead nodes, and resources of which a node has none.
    total = record.get("resources_total") or {}
    return Node(
        node_id=record["node_id"],
        address=record["node_ip"],
        hostname=record.get("node_name") or record["node_ip"],
        cpus=float(total.get("CPU", 0)),
        gpus=float(total.get("GPU", 0)),
        memory_bytes=int(total.get("memory", 0)),
        alive=record["state"] == "ALIVE",
    )
