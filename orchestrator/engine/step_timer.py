"""Time steps and their phases, and read memory statistics, without synchronizing the device."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

Phase = Literal["data", "forward", "backward", "optimizer"]


class StepTimer:
    """Measures the wall time of steps and the time of each phase.

    On CUDA phases are timed by events in the stream, so that the host waits for the device only once a
    step. The data phase runs on the host and is timed there.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time of the block to a phase of the current step."""
        if self._cuda and name != "data":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            start_seconds = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_seconds

    def phase_seconds(self) -> dict[Phase, float]:
        """Return the seconds of each phase of the current step; synchronizes the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return {name: self._seconds[name] for name in ("data", "forward", "backward", "optimizer")}

    def lap(self) -> float:
        """Return the wall seconds since the last `lap` or `restart`, and start the next step."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._seconds.clear()
        return seconds

    def restart(self) -> None:
        """Start the next step now; the time since `lap` (evaluation, checkpoint) counts for no step."""
        self._start = time.perf_counter()


def memory_stats(device: torch.device) -> dict[str, float]:
    """Return the memory of device and process by field of `RankStep`; on CPU both are host memory."""
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        return {
            "memory_bytes": torch.cuda.memory_allocated(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.memory_reserved(device),
            "memory_reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
            "host_memory_peak_bytes": host_peak,
        }
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return {
        "memory_bytes": resident,
        "memory_peak_bytes": host_peak,
        "memory_reserved_bytes": resident,
        "memory_reserved_peak_bytes": host_peak,
        "host_memory_peak_bytes": host_peak,
    }
