"""A failed connection to Ray is reported quickly, with cause and remedy."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from orchestrator.errors import ClusterError
from orchestrator.train import ray_connection, ray_session


@pytest.mark.parametrize("address", ["foo", "head:x", "head:70000", "ray://head:1", "http://head:8265", ":1"])
def test_an_invalid_address_is_rejected_immediately(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session.ray, "init", _no_call)
    with pytest.raises(ClusterError) as caught, ray_session.connected(address):
        pass
    assert f"Ray at {address} cannot be reached (not HOST:PORT); " in str(caught.value)
    assert "10.0.0.1:6379" in str(caught.value)


def test_a_closed_port_is_rejected_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session.ray, "init", _no_call)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        pytest.raises(ClusterError, match=r"Connection refused\); check that the head is running"),
        ray_session.connected(address),
    ):
        pass
    ray_connection.require_listener("auto")
    ray_connection.require_listener(None)


@pytest.mark.parametrize(
    ("address", "error", "remedy"),
    [
        (
            "h:1",
            RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9"),
            "the Ray and Python versions of the cluster",
        ),
        ("h:1", RuntimeError("Authentication failed: a token is required"), "set RAY_AUTH_TOKEN"),
        ("auto", ConnectionError("Could not find any running Ray instance."), "run `ray start` on this node"),
        ("h:1", ConnectionError("GCS has started, but no raylets"), "check that the head is running"),
        (None, Exception("The current node timed out during startup."), "free memory"),
    ],
)
def test_the_remedy_depends_on_the_cause(address: str | None, error: Exception, remedy: str) -> None:
    assert remedy in str(ray_connection.unreachable(address, error))


def _no_call(**_: Any) -> None:
    pytest.fail("Ray was started")
