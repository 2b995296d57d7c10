"""An address that is none, and a dashboard that takes no job, give one sentence with a remedy that fits."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError

from orchestrator.errors import ClusterError
from orchestrator.submit.dashboard_address import dashboard_address, refused
from tests.conftest import job_text, orchestrator


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("foo", "has no port"),
        ("auto", "has no port"),
        ("http://", "names no host"),
        ("http://foo", "has no port"),
        ("http://head:82b5", "no address"),
        ("http://[::1", "no address"),
        ("http://my head:8265", "names no host"),
        ("ray://head:10001", "takes no jobs"),
        ("ftp://head:8265", "ftp:// is no dashboard"),
    ],
)
def test_what_is_no_address_is_refused(text: str, words: str) -> None:
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
def test_an_address_is_taken_as_it_is_meant(text: str, address: str) -> None:
    assert dashboard_address(text) == address


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AuthenticationError("Authentication required: Unauthorized"), "has none; set RAY_AUTH_TOKEN"),
        (AuthenticationError("Authentication failed: a token is required"), "the one that it has"),
        (OSError("SSLError: CERTIFICATE_VERIFY_FAILED"), "with --certificate"),
        (FileNotFoundError("Path to CA certificates: 'x', does not exist."), "name an existing file"),
        (OSError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), "write http:// in --address"),
        (ConnectionError("Failed to connect to Ray at address: http://h"), "cannot be reached"),
        (RuntimeError("Version check returned 404. Please ensure"), "something else answers there"),
        (ValueError("Expecting value: line 1 column 1 (char 0)"), "something else answers there"),
        (RuntimeError("Client Ray version 2.60 is not compatible"), "the version of Ray here"),
        (RuntimeError("variables cannot be sent, HTTP 500"), "the head does not store what travels"),
        (RuntimeError("Request failed with status code 500: boom."), "see dashboard.log on the head"),
    ],
)
def test_a_refusal_says_what_to_set(error: Exception, words: str) -> None:
    said = str(refused("http://head:8265", error))
    assert words in said
    assert ("check --address" in said) == isinstance(error, ConnectionError)


def test_a_port_that_speaks_something_else(tmp_path: Path) -> None:
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
            there, _ = server.accept()
        except OSError:
            return
        there.recv(4096)
        there.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        there.close()
