"""Conversion of Ray's state API records to nodes."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from orchestrator.cluster.topology import Node, from_state_api

LIVE = {
    "node_id": "b",
    "node_ip": "10.0.0.2",
    "node_name": "two",
    "state": "ALIVE",
    "resources_total": {"CPU": 4.0, "GPU": 1.0, "memory": 1024.0, "node:10.0.0.2": 1.0},
}
DEAD: dict[str, Any] = {"node_id": "a", "node_ip": "10.0.0.1", "node_name": None, "state": "DEAD"}


def test_live_nodes_come_first_with_their_resources() -> None:
    assert from_state_api([DEAD, LIVE]) == (
        Node("b", "10.0.0.2", "two", 4.0, 1.0, 1024, alive=True),
        Node("a", "10.0.0.1", "10.0.0.1", 0.0, 0.0, 0, alive=False),
    )


def test_a_record_without_state_is_an_error() -> None:
    with pytest.raises(KeyError, match="state"):
        from_state_api([{"node_id": "a", "node_ip": "10.0.0.1"}])


def test_nodes_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        from_state_api([LIVE])[0].cpus = 1  # type: ignore[misc]
