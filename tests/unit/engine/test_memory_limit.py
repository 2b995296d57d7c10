"""Memory limits of a worker, and out-of-memory errors as distinct from all other failures."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from orchestrator.engine.memory_limit import is_out_of_memory, limit_memory
from orchestrator.errors import MemoryExhaustedError, TrainingError
from orchestrator.run.failures import worker_group_error

CPU = torch.device("cpu")
LIMITED = """
import resource
import torch
from orchestrator.engine.memory_limit import is_out_of_memory, limit_memory
MIB = 2**20
before = resource.getrlimit(resource.RLIMIT_DATA)
with limit_memory(torch.device("cpu"), 256 * MIB):
    within = torch.ones(64 * MIB, dtype=torch.uint8)
    try:
        torch.ones(512 * MIB, dtype=torch.uint8)
    except RuntimeError as error:
        assert is_out_of_memory(error), error
    else:
        raise AssertionError("512 MiB were allocated with a limit of 256 MiB")
assert resource.getrlimit(resource.RLIMIT_DATA) == before
torch.ones(512 * MIB, dtype=torch.uint8)
"""


@pytest.mark.process
def test_a_worker_can_allocate_up_to_its_limit() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_none_sets_no_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limit_memory(CPU, None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_the_limit_is_removed_before_an_exception_leaves_the_block() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(RuntimeError, match="the step"), limit_memory(CPU, 2**40):
        raise RuntimeError("the step")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("std::bad_alloc"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed"), MemoryExhaustedError),
        (
            RuntimeError("1 worker(s) were killed due to the node running low on memory."),
            MemoryExhaustedError,
        ),
        (
            RuntimeError(
                "The actor died. Refer to the documentation on how to address the out of memory issue"
            ),
            MemoryExhaustedError,
        ),
        (MemoryExhaustedError("rank 0 ran out of memory"), MemoryExhaustedError),
        (RuntimeError("worker died"), TrainingError),
    ],
)
def test_a_worker_killed_by_ray_for_memory_is_an_out_of_memory_error(
    failure: Exception, expected: type[Exception]
) -> None:
    group: Any = SimpleNamespace(worker_failures={0: failure})
    assert type(worker_group_error(group, [], 0, Path("logs"))) is expected
