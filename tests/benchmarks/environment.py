"""Describes the machine of a measurement, and runs the peers that a benchmark compares with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PEERS = ROOT / ".venv-peers"
_PACKAGES = ("trl==1.16.0", "torch==2.13.0", "datasets==5.2.0", "transformers==5.23.0")


def describe(*packages: str) -> dict[str, Any]:
    """Return the CPU, cores, memory and versions of `packages` on this machine."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def run_peer(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of tests/benchmarks/peers in a virtual environment of its own, created at first use.

    Args:
        script: Name of the script, without `.py`; its last line of output is one JSON object.
        *arguments: Arguments of the script.

    Returns:
        The JSON object that it printed.

    Raises:
        RuntimeError: The script failed.
    """
    python = _PEERS / "bin" / "python"
    ready = _PEERS / ".ready"
    if not ready.exists() or ready.read_text() != " ".join(_PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_PEERS)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *_PACKAGES], check=True)
        ready.write_text(" ".join(_PACKAGES))
    path = ROOT / "tests" / "benchmarks" / "peers" / f"{script}.py"
    done = subprocess.run([str(python), str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def say(text: str) -> None:
    """Print a line to stdout and flush."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
