"""What the nodes of a cluster are: plain values that say nothing about how they were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the cluster, with the resources it offers in total.

    Attributes:
        node_id: The cluster's own identifier; a node that comes back has a new one.
        address: IP address by which other nodes reach it.
        hostname: Name the node gives itself.
        cpus: Logical processors offered, which may be a fraction.
        gpus: Logical accelerators offered.
        memory_bytes: Main memory offered, in bytes.
        alive: Whether the cluster believes it is up.
    """

    node_id: str
    address: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    alive: bool = True


def from_state_api(records: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Turn node records of Ray's state API into nodes, ordered by address, live ones first.

    Args:
        records: What ``GET /api/v0/nodes?detail=1`` of the dashboard lists, one mapping a node. The hostname
            is its ``node_name``, which is the address unless ``ray start --node-name`` says otherwise.

    Raises:
        KeyError: A record lacks ``node_id``, ``node_ip`` or ``state``.
    """
    nodes = [_node(record) for record in records]
    return tuple(sorted(nodes, key=lambda node: (not node.alive, node.address, node.node_id)))


def _node(record: Mapping[str, Any]) -> Node:
    # Ray drops the resources of a dead node, and leaves out those a node has none of.
    offered = record.get("resources_total") or {}
    return Node(
        node_id=record["node_id"],
        address=record["node_ip"],
        hostname=record.get("node_name") or record["node_ip"],
        cpus=float(offered.get("CPU", 0)),
        gpus=float(offered.get("GPU", 0)),
        memory_bytes=int(offered.get("memory", 0)),
        alive=record["state"] == "ALIVE",
    )
