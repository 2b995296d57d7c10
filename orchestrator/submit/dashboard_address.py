"""The address of a cluster's dashboard: which ones there are, and why one does not take a job."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from orchestrator.errors import ClusterError

_EXAMPLE = "name the cluster's dashboard, such as http://HEAD:8265"


def dashboard_address(text: str) -> str:
    """Return the address of a dashboard as Ray's client takes it; HOST:PORT means http.

    Raises:
        ClusterError: It is no address of a dashboard.
    """
    address = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ClusterError(f"--address {text}: no address ({error}); {_EXAMPLE}") from None
    if parts.scheme in ("ray", "auto"):
        raise ClusterError(f"--address {text}: Ray's client protocol takes no jobs; {_EXAMPLE}")
    if parts.scheme not in ("http", "https"):
        raise ClusterError(f"--address {text}: {parts.scheme}:// is no dashboard; {_EXAMPLE}")
    if not host or re.search(r"\s", address):
        raise ClusterError(f"--address {text}: names no host; {_EXAMPLE}")
    if host == "auto" or (
        parts.scheme == "http" and port is None and "." not in host and host != "localhost"
    ):
        raise ClusterError(f"--address {text}: has no port; {_EXAMPLE}")
    return address.rstrip("/")


def refused(address: str, error: Exception) -> ClusterError:
    """Say why the dashboard does not take a job, with the remedy for that reason."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    whole = _with_causes(error)
    if "Authentication" in whole:
        return ClusterError(
            f"the Ray dashboard at {address} asks for a token, and "
            + ("has none" if "Authentication required" in whole else "does not know the one that it has")
            + "; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
        )
    if isinstance(error, FileNotFoundError) and "CA certificates" in whole:
        return ClusterError(f"{reason}; name an existing file with --certificate")
    if "CERTIFICATE" in whole:
        return ClusterError(
            f"the certificate of the Ray dashboard at {address} is not trusted ({reason}); name the "
            "authority's certificate with --certificate"
        )
    return ClusterError(f"the Ray dashboard at {address} {_what(whole)} ({reason}); {_remedy(whole)}")


def _with_causes(error: BaseException | None) -> str:
    """Return what an error and those behind it say: Ray's own leave out why there is no connection."""
    said: list[str] = []
    while error is not None and len(said) < 10:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return " ".join(said)


def _what(whole: str) -> str:
    if _is_other_server(whole):
        return "is no Ray dashboard"
    return "cannot be reached" if _is_no_connection(whole) else "does not take the job"


def _remedy(whole: str) -> str:
    if "WRONG_VERSION_NUMBER" in whole:
        return "the port speaks plain HTTP: write http:// in --address"
    if _is_other_server(whole):
        return (
            "something else answers there; the dashboard's port is 8265 unless `ray start` was told another"
        )
    if _is_no_connection(whole):
        return "check --address, that the head is up, and that proxies let this through"
    if "No available agent" in whole:
        return "the head has just started, or is overloaded: submit again in a minute"
    if "versions" in whole or "not compatible" in whole:
        return "install the version of Ray here that the cluster runs"
    if "package" in whole.lower() or "variables cannot be sent" in whole:
        return "the head does not store what travels: see its dashboard.log, and its memory"
    return "see dashboard.log on the head"


def _is_no_connection(whole: str) -> bool:
    signs = ("Failed to connect", "Connection refused", "Max retries", "timed out", "resolve", "unreachable")
    return any(sign in whole for sign in signs)


def _is_other_server(whole: str) -> bool:
    signs = ("returned 404", "Expecting value", "BadStatusLine", "RemoteDisconnected", "WRONG_VERSION_NUMBER")
    return any(sign in whole for sign in signs)
