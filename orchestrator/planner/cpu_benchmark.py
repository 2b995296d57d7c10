"""Benchmarks this machine's CPU with concurrent workers, for step time predictions on CPU.

`python -m orchestrator.planner.cpu_benchmark` prints the rates of one process as JSON.
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
_SIDE = 768  # three such matrices exceed the per-core caches
_COPIED = 64 * 2**20


@dataclass(frozen=True)
class CpuRates:
    """CPU rates of one of several concurrent processes.

    Attributes:
        flops: fp32 matmul FLOP/s.
        bytes: Memory bandwidth of copies in bytes per second, reads and writes.
    """

    flops: float
    bytes: float


def measure(workers: int, threads: int = 1) -> CpuRates:
    """Measure the mean rates of concurrent processes in about one second.

    Args:
        workers: Number of concurrent processes, which share caches, memory and often cores.
        threads: Threads per process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = module_command("orchestrator.planner.cpu_benchmark")
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(workers)
    ]
    outputs = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    flops, moved = (float(np.mean([output[name] for output in outputs])) for name in ("flops", "bytes"))
    return CpuRates(flops, moved)


def cpu_device(memory_gib: float, rates: CpuRates | None = None) -> Device:
    """Return the CPU share of one worker as a device.

    Args:
        memory_gib: Memory per worker.
        rates: From `measure`; without them the step time cannot be predicted.
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
            "interconnect": "pcie",  # processes exchange data through shared memory
            "interconnect_gb_per_second": moved,
            "host_link_gb_per_second": 2 * moved,
            "source": "measured on this machine",
        }
    )


def _rates() -> dict[str, float]:
    matrix = np.random.default_rng(0).random((_SIDE, _SIDE), dtype=np.float32)
    source, target = np.zeros(_COPIED, dtype=np.uint8), np.ones(_COPIED, dtype=np.uint8)
    products = _calls_per_second(lambda: matrix @ matrix)
    copies = _calls_per_second(lambda: np.copyto(target, source))
    return {"flops": products * 2.0 * _SIDE**3, "bytes": copies * 2.0 * _COPIED}


def _calls_per_second(work: Callable[[], object]) -> float:
    work()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        work()
        times += 1
    return times / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_rates()))
