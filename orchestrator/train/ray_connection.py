"""How this program starts or joins a Ray, and what it says where that fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.package_data import PACKAGE
from orchestrator.train import environment

_SECONDS_TO_CONNECT = 20.0
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def init_arguments(address: str | None, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of `ray.init`.

    Args:
        address: Address of a cluster; None for a local Ray, whose processes inherit this one's environment.
        names: Variables that are passed on to a cluster besides the default ones.
    """
    if address is None:
        # Imported before Ray puts the working directory first on a worker's path: a package of the same name
        # that lies there would be taken for ours. On a cluster the set-up of workers does it.
        return {
            "include_dashboard": False,
            "_system_config": {"preload_python_modules": [PACKAGE.name]},
            **_QUIET,
        }
    setup = environment.worker_setup(environment.forwarded(os.environ, names))
    return {"address": address, "runtime_env": {"worker_process_setup_hook": setup}, **_QUIET}


def require_listener(address: str | None) -> None:
    """Find out in seconds that nothing is at an address: Ray tries for minutes, and complains all the while.

    Raises:
        OSError: Nobody listens there.
        ValueError: It is no HOST:PORT.
    """
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError("not HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()


def unreachable(address: str | None, error: Exception) -> ClusterError:
    """Return the error that says why there is no Ray, with the remedy for that reason."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    where = f"Ray at {address} cannot be reached" if address else "a local Ray cannot be started"
    return ClusterError(f"{where} ({reason}); {_remedy(address, reason, str(error))}")


def _remedy(address: str | None, reason: str, whole: str) -> str:
    if address is None:
        return "free memory, processors or space in /tmp, and start again"
    if "ersion mismatch" in whole:
        return "start this command with the versions of Ray and Python that the cluster runs"
    if "uthenticat" in whole or "token" in whole.lower():
        return "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
    if address == "auto" or "Could not find any running Ray" in whole:
        return "run `ray start` on this node first, name the cluster's HOST:PORT, or leave out --address"
    if "://" in address:
        return (
            "name HOST:PORT of the head, such as 10.0.0.1:6379; `orchestrator submit` takes http://HEAD:8265"
        )
    return (
        "check that the head is up and that --address is HOST:PORT of its `ray start`, such as 10.0.0.1:6379"
    )
