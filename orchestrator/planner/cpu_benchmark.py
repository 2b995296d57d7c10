"""How fast this machine's processors are while so many workers use them: no catalogue can know.

`python -m orchestrator.planner.cpu_benchmark` prints the rates of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orchestrator.cluster import hardware
from orchestrator.cluster.hardware import Device, PeakTflops
from orchestrator.config.paths import module_command

_SECONDS = 0.5
_SIDE = 768  # three matrices of it are larger than the caches that belong to one core
_COPIED = 64 * 2**20


@dataclass(frozen=True)
class CpuRates:
    """What one of several processes has of this machine's processors.

    Attributes:
        flops: Operations a second in fp32, of products of matrices.
        bytes: Read and written a second by copies.
    """

    flops: float
    bytes: float


def measure(workers: int, threads: int = 1) -> CpuRates:
    """Return the rates of one of several processes, in a second or so.

    Args:
        workers: How many work at the same time: they share caches, memory and often cores.
        threads: Of each.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = module_command("orchestrator.planner.cpu_benchmark")
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(workers)
    ]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    flops, moved = (float(np.mean([each[name] for each in said])) for name in ("flops", "bytes"))
    return CpuRates(flops, moved)


def cpu_device(memory_gib: float, rates: CpuRates | None = None) -> Device:
    """Return this machine's processors as one worker sees them.

    Args:
        memory_gib: What each worker may take.
        rates: From `measure`; without them, nothing is known of its speed.
    """
    memory = {"memory_gib": memory_gib, "host_memory_gib": memory_gib}
    known = {**hardware.device("cpu").model_dump(), **memory}
    if rates is None:
        return Device(**known)
    moved = rates.bytes / 1e9
    return Device(
        **{
            **known,
            "memory_bandwidth_gb_per_second": moved,
            "peak_tflops": PeakTflops(fp32=rates.flops / 1e12),
            "interconnect": "pcie",  # shared memory: what one process writes, another one reads
            "interconnect_gb_per_second": moved,
            "host_link_gb_per_second": 2 * moved,
            "source": "measured on this machine",
        }
    )


def _rates() -> dict[str, float]:
    matrix = np.random.default_rng(0).random((_SIDE, _SIDE), dtype=np.float32)
    source, target = np.zeros(_COPIED, dtype=np.uint8), np.ones(_COPIED, dtype=np.uint8)
    products = _a_second(lambda: matrix @ matrix)
    copies = _a_second(lambda: np.copyto(target, source))
    return {"flops": products * 2.0 * _SIDE**3, "bytes": copies * 2.0 * _COPIED}


def _a_second(work: Callable[[], object]) -> float:
    work()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        work()
        times += 1
    return times / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_rates()))
