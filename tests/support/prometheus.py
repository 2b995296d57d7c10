"""A Prometheus that reads the configuration that is shipped, for tests that ask it."""

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
    """A server with the shipped rules, that scrapes every second; a context manager.

    Args:
        folder: Where its configuration and data go.
        targets: Files of targets by their names in `targets/`, each a list of addresses.
        cluster: Label of all targets.

    Attributes:
        local: Stands for the folder in which runs of this machine list their endpoints.
    """

    def __init__(self, folder: Path, targets: Mapping[str, list[str]], cluster: str) -> None:
        self._folder = folder / "monitoring"
        shutil.copytree(MONITORING, self._folder)
        text = (self._folder / "prometheus.yml").read_text()
        assert text.count(": 15s") == 2
        local = '"/tmp/orchestrator-targets/*.json"'
        assert text.count(local) == 1  # this machine's own runs are not looked at
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
        wait_until(self._is_ready, 60, "Prometheus answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)

    def ask(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the series that a query finds, now or at a Unix time, each with one value."""
        asked = {"query": query} if at is None else {"query": query, "time": at}
        return list(self._data("query", asked)["result"])

    def range(self, query: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the series that a query finds between two times, each with values every so many seconds."""
        asked = {"query": query, "start": begin, "end": end, "step": step}
        return list(self._data("query_range", asked)["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules, as they were last evaluated."""
        return [rule for group in self._data("rules", {})["groups"] for rule in group["rules"]]

    def _data(self, kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self.port}/api/v1/{kind}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                found: dict[str, Any] = json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{address}: {error.read().decode()}")
        return found

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
