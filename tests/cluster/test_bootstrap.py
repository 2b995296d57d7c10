"""The bootstrap scripts start a real Ray head with token authentication, and SIGTERM stops it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.support.prometheus import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.ray]
BOOTSTRAP = ROOT / "cluster" / "bootstrap"


def test_a_head_is_started_waited_for_and_stopped(tmp_path: Path) -> None:
    port = free_port()
    temp_dir = f"/tmp/ray-test-{os.getpid()}"  # short: paths of sockets are limited
    env = {
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RAY_AUTH_TOKEN": "5f" * 32,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "ORCHESTRATOR_INTERFACE": "lo",
        "ORCHESTRATOR_RAY_PORT": str(port),
        "ORCHESTRATOR_RAY_TMP": temp_dir,
    }
    env.pop("RAY_AUTH_MODE", None)
    options = ["--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000"]
    with (tmp_path / "log").open("w") as log:
        head = subprocess.Popen([BOOTSTRAP / "ray-head.sh", *options], env=env, stdout=log, stderr=log)
    try:
        done = subprocess.run(
            [BOOTSTRAP / "wait-for-nodes.sh", "1"],
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
        assert "1 nodes have joined the Ray cluster" in done.stderr
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(temp_dir, ignore_errors=True)
    left = subprocess.run(["pgrep", "-f", f"gcs_server.*{port}"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
