"""Parsing of dashboard addresses, and errors for dashboards that do not accept a job."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from orchestrator.errors import ClusterError

_EXAMPLE = "use the address of the cluster's dashboard, such as http://HEAD:8265"


def dashboard_address(text: str) -> str:
    """Return a dashboard address in the form that Ray's job client accepts; HOST:PORT means http.

    Raises:
        ClusterError: The text is not the address of a dashboard.
    """
    address = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ClusterError(f"--address {text}: not a valid address ({error}); {_EXAMPLE}") from None
    if parts.scheme in ("ray", "auto"):
        raise ClusterError(f"--address {text}: Ray's client protocol does not accept jobs; {_EXAMPLE}")
    if parts.scheme not in ("http", "https"):
        raise ClusterError(f"--address {text}: {parts.scheme}:// is not supported; {_EXAMPLE}")
    if not host or re.search(r"\s", address):
        raise ClusterError(f"--address {text}: no host; {_EXAMPLE}")
    if host == "auto" or (
        parts.scheme == "http" and port is None and "." not in host and host != "localhost"
    ):
        raise ClusterError(f"--address {text}: no port; {_EXAMPLE}")
    return address.rstrip("/")


def submission_error(address: str, error: Exception) -> ClusterError:
    """Convert an error of Ray's job client to a ClusterError with cause and remedy."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    text = _with_causes(error)
    if "Authentication" in text:
        problem = (
            "requires a token"
            if "Authentication required" in text
            else "rejected the token in RAY_AUTH_TOKEN"
        )
        return ClusterError(
            f"the Ray dashboard at {address} {problem}; set RAY_AUTH_TOKEN to the token of the cluster, or "
            "RAY_AUTH_TOKEN_PATH to a file that contains it"
        )
    if isinstance(error, FileNotFoundError) and "CA certificates" in text:
        return ClusterError(f"{reason}; pass an existing file with --certificate")
    if "CERTIFICATE" in text:
        return ClusterError(
            f"the certificate of the Ray dashboard at {address} is not trusted ({reason}); pass the "
            "certificate of its CA with --certificate"
        )
    return ClusterError(f"the Ray dashboard at {address} {_symptom(text)} ({reason}); {_remedy(text)}")


def _with_causes(error: BaseException | None) -> str:
    """Return the messages of an error and its causes; Ray's own message omits why a connection failed."""
    messages: list[str] = []
    while error is not None and len(messages) < 10:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return " ".join(messages)


def _symptom(text: str) -> str:
    if _is_other_server(text):
        return "is not a Ray dashboard"
    return "cannot be reached" if _is_no_connection(text) else "does not accept the job"


def _remedy(text: str) -> str:
    if "WRONG_VERSION_NUMBER" in text:
        return "the port serves plain HTTP: use http:// in --address"
    if _is_other_server(text):
        return "another service is listening there; the default port of the dashboard is 8265"
    if _is_no_connection(text):
        return "check --address, that the head is running, and that proxies do not block the connection"
    if "No available agent" in text:
        return "the head has just started or is overloaded: submit again in a minute"
    if "versions" in text or "not compatible" in text:
        return "install the Ray version of the cluster on this machine"
    if "package" in text.lower() or "environment variables could not be sent" in text:
        return "the head could not store the uploaded files: check its dashboard.log and its free memory"
    return "see dashboard.log on the head"


def _is_no_connection(text: str) -> bool:
    signs = ("Failed to connect", "Connection refused", "Max retries", "timed out", "resolve", "unreachable")
    return any(sign in text for sign in signs)


def _is_other_server(text: str) -> bool:
    signs = ("returned 404", "Expecting value", "BadStatusLine", "RemoteDisconnected", "WRONG_VERSION_NUMBER")
    return any(sign in text for sign in signs)
