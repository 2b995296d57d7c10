"""Testbeds whose nodes can run the jobs of these tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support import load
from tests.support.testbed import Testbed, unavailable_reason


def new_bed(nodes: int, cpus_per_node: int, **env: str) -> Testbed:
    """Return a testbed, or skip the test if it cannot run on this machine.

    Args:
        nodes: Number of Ray nodes including the head.
        cpus_per_node: Logical CPUs per node.
        env: Additional environment of the nodes. Without PYTHONPATH each job brings its own code.
    """
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return Testbed(nodes, cpus_per_node, env={"PATH": path, "PYTHONPATH": "", **load.RAY, **env})
