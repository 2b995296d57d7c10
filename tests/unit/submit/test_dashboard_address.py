"""Invalid dashboard addresses and failed submissions are reported with cause and remedy."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError

from orchestrator.errors import ClusterError
from orchestrator.submit.dashboard_address import dashboard_address, submission_error
from tests.conftest import job_text, orchestrator


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no host"),
        ("foo", "no port"),
        ("auto", "no port"),
        ("http://", "no host"),
        ("http://foo", "no port"),
        ("http://head:82b5", "not a valid address"),
        ("http://[::1", "not a valid address"),
        ("http://my head:8265", "no host"),
        ("ray://head:10001", "does not accept jobs"),
        ("ftp://head:8265", "ftp:// is not supported"),
    ],
)
def test_invalid_addresses_are_rejected(text: str, words: str) -> None:
    with pytest.raises(ClusterError) as caught:
        dashboard_address(text)
    assert words in str(caught.value)
    assert str(caught.value).endswith("such as http://HEAD:8265")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("https://ray.example.org/team/a", "https://ray.example.org/team/a"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_valid_addresses_are_normalized(text: str, address: str) -> None:
    assert dashboard_address(text) == address


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            AuthenticationError("Authentication required: Unauthorized"),
            "requires a token; set RAY_AUTH_TOKEN",
        ),
        (
            AuthenticationError("Authentication failed: a token is required"),
            "rejected the token in RAY_AUTH_TOKEN",
        ),
        (OSError("SSLError: CERTIFICATE_VERIFY_FAILED"), "with --certificate"),
        (FileNotFoundError("Path to CA certificates: 'x', does not exist."), "pass an existing file"),
        (OSError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), "use http:// in --address"),
        (ConnectionError("Failed to connect to Ray at address: http://h"), "cannot be reached"),
        (RuntimeError("Version check returned 404. Please ensure"), "another service is listening there"),
        (ValueError("Expecting value: line 1 column 1 (char 0)"), "another service is listening there"),
        (RuntimeError("Client Ray version 2.60 is not compatible"), "the Ray version of the cluster"),
        (RuntimeError("environment variables could not be sent, HTTP 500"), "could not store the uploaded"),
        (RuntimeError("Request failed with status code 500: boom."), "see dashboard.log on the head"),
    ],
)
def test_the_remedy_depends_on_the_cause(error: Exception, words: str) -> None:
    message = str(submission_error("http://head:8265", error))
    assert words in message
    assert ("check --address" in message) == isinstance(error, ConnectionError)


@pytest.mark.process
def test_a_port_with_another_protocol(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer, args=(server,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = orchestrator("submit", "job.yaml", "--address", address, "--no-wait", cwd=tmp_path)
    assert done.code == ClusterError.exit_code
    assert "Traceback" not in done.err
    assert address in done.err.splitlines()[-1]


def _answer(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        connection.recv(4096)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()
