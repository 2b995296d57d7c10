"""Test beds whose nodes can run what these tests submit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.testbed import Testbed, unavailable_reason


def new_bed(nodes: int, cpus_per_node: int, **env: str) -> Testbed:
    """Return a test bed, or skip the test with the reason that there can be none.

    Args:
        nodes: Number of Ray nodes, the head included.
        cpus_per_node: Logical processors of each.
        env: Environment of the nodes, beside the commands of this interpreter. Without a PYTHONPATH the code
            comes with each job.
    """
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return Testbed(nodes, cpus_per_node, env={"PATH": path, "PYTHONPATH": "", **env})
