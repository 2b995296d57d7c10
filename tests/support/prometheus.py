"""Runs a Prometheus server with the example configuration for tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import ROOT, wait_until

MONITORING = ROOT / "k8s" / "monitoring"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing: apt-get install prometheus"
)


class Prometheus:
    """A Prometheus server with the example rules that scrapes every second; a context manager.

    Args:
        folder: Folder for configuration and data.
        targets: Addresses by the name of the target file in `targets/`.
        cluster: Label `cluster` of all targets.

    Attributes:
        local: Replaces the folder with the target files of runs on this machine.
    """

    def __init__(self, folder: Path, targets: Mapping[str, list[str]], cluster: str) -> None:
        self._folder = folder / "monitoring"
        shutil.copytree(MONITORING, self._folder)
        text = (self._folder / "prometheus.yml").read_text()
        assert text.count(": 15s") == 2
        local = '"/tmp/orchestrator-targets/*.json"'
        assert text.count(local) == 1  # do not scrape other runs of this machine
        self.local = self._folder / "local"
        text = text.replace(local, f'"{self.local}/*.json"').replace("interval: 10s", "interval: 1s")
        text = text.replace(": 15s", ": 1s").replace("scrape_timeout: 10s", "scrape_timeout: 1s")
        (self._folder / "prometheus.yml").write_text(text)
        for name, addresses in targets.items():
            entry = {"targets": addresses, "labels": {"cluster": cluster}}
            (self._folder / "targets" / name).write_text(json.dumps([entry]))
        self.port = free_port()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GOMAXPROCS": "1"},
        )
        wait_until(self._is_ready, 60, "Prometheus is ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)

    def ask(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the result of an instant query, now or at a Unix time."""
        arguments = {"query": query} if at is None else {"query": query, "time": at}
        return list(self._data("query", arguments)["result"])

    def range(self, query: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the result of a range query; times and step are in seconds."""
        arguments = {"query": query, "start": begin, "end": end, "step": step}
        return list(self._data("query_range", arguments)["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their last evaluation."""
        return [rule for group in self._data("rules", {})["groups"] for rule in group["rules"]]

    def _data(self, kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self.port}/api/v1/{kind}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                data: dict[str, Any] = json.loads(response.read())["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{address}: {error.read().decode()}")
        return data

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
