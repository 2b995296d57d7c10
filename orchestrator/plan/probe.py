"""How fast this machine's processors are while so many workers use them: no catalogue can know.

`python -m orchestrator.plan.probe` prints the rates of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from cluster import hardware
from cluster.hardware import Device, PeakTflops

_SECONDS = 0.5
_SIDE = 768  # three matrices of it are larger than the caches that belong to one core
_COPIED = 64 * 2**20


def processor(workers: int, memory_gib: float) -> Device:
    """Return this machine's processors as seen by one of several workers, each with one thread.

    Args:
        workers: How many work at the same time: they share caches, memory and often cores.
        memory_gib: What each may take.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orchestrator.plan.probe"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(workers)
    ]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    flops, moved = (float(np.mean([each[name] for each in said])) for name in ("flops", "bytes"))
    known = hardware.device("cpu").model_dump()
    return Device(
        **{
            **known,
            "memory_gib": memory_gib,
            "host_memory_gib": memory_gib,
            "memory_bandwidth_gb_per_second": moved / 1e9,
            "peak_tflops": PeakTflops(fp32=flops / 1e12),
            "interconnect": "pcie",  # shared memory: what one process writes, another one reads
            "interconnect_gb_per_second": moved / 1e9,
            "host_link_gb_per_second": 2 * moved / 1e9,
            "source": f"measured on this machine with {workers} at a time",
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
