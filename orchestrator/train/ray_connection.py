"""Arguments of `ray.init` and error messages for failed connections."""

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
        names: Environment variables to forward to a cluster in addition to the default ones.
    """
    if address is None:
        # Import our package before Ray puts the working directory first on a worker's sys.path, where a
        # package of the same name would shadow it. On a cluster the worker setup hook does this.
        return {
            "include_dashboard": False,
            "_system_config": {"preload_python_modules": [PACKAGE.name]},
            **_QUIET,
        }
    setup = environment.worker_setup_hook(environment.forwarded_env(os.environ, names))
    return {"address": address, "runtime_env": {"worker_process_setup_hook": setup}, **_QUIET}


def require_listener(address: str | None) -> None:
    """Check that a TCP port is open; Ray itself would retry for minutes and print warnings.

    Raises:
        OSError: The connection failed.
        ValueError: The address is not HOST:PORT.
    """
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError("not HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()


def unreachable(address: str | None, error: Exception) -> ClusterError:
    """Convert an error of `ray.init` to a ClusterError with cause and remedy."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    where = f"Ray at {address} cannot be reached" if address else "a local Ray cannot be started"
    return ClusterError(f"{where} ({reason}); {_remedy(address, reason, str(error))}")


def _remedy(address: str | None, reason: str, message: str) -> str:
    if address is None:
        return "free memory, CPUs or disk space in /tmp, and start again"
    if "ersion mismatch" in message:
        return "run this command with the Ray and Python versions of the cluster"
    if "uthenticat" in message or "token" in message.lower():
        return "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that contains it"
    if address == "auto" or "Could not find any running Ray" in message:
        return "run `ray start` on this node first, pass HOST:PORT of the cluster, or omit --address"
    if "://" in address:
        return (
            "use HOST:PORT of the head, such as 10.0.0.1:6379; `orchestrator submit` accepts http://HEAD:8265"
        )
    return "check that the head is running and that --address is HOST:PORT of its GCS, such as 10.0.0.1:6379"
