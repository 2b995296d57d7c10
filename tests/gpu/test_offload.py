"""Tests on a GPU that offloaded optimizer state is in host memory and not in device memory.

On CPU these are the same memory; there `tests/invariant/test_equivalence.py` checks that DeepSpeedCPUAdam
holds the state.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariant import material

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
# 90 million parameters, so that optimizer state is much larger than activations and buffers on the device.
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "initializer_range": 0.02}
MOMENTS_BYTES = 8  # per parameter: two fp32 moments
OFFLOADED = {
    "zero1": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "zero2": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "zero3-all": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
ON_THE_DEVICE = {name: {"zero_stage": stage} for name, stage in (("zero1", 1), ("zero2", 2), ("zero3", 3))}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    material.write_model(folder / "model", **SIZES)
    material.write_documents(folder / "documents", 20, seed=1)
    return folder


def found_of(home: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    document = material.job(home / "model", 1, {"device": "cuda", **parallel}, max_steps=2)
    task = {"job": document, "data": str(home / "documents")}
    (home / "task.json").write_text(json.dumps(task), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.offload_probe", str(home / "task.json"), "cuda"],
        cwd=ROOT, env={**os.environ, **one}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{parallel}: {found}")  # noqa: T201 - figures for the record
    return found


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_state_is_in_host_memory(name: str, home: Path) -> None:
    found = found_of(home, OFFLOADED[name])
    assert found["type"] == "DeepSpeedCPUAdam"
    assert found["devices"] == ["cpu"]
    assert found["moment_bytes"] >= MOMENTS_BYTES * found["parameters"]
    # At most bf16 weights and gradients (2 + 2 bytes per parameter), and buffers.
    assert found["device_bytes"] < 6 * found["parameters"]


@pytest.mark.parametrize("name", ON_THE_DEVICE)
def test_otherwise_it_is_on_the_device(name: str, home: Path) -> None:
    found = found_of(home, ON_THE_DEVICE[name])
    assert found["devices"] == ["cuda"]
    assert found["device_bytes"] > (2 + 4 + MOMENTS_BYTES) * found["parameters"]
