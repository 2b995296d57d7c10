"""One worker of a cell of the memory benchmark: trains a step on a pack and measures its peak memory.

`group.run_group` starts it as `python -m tests.benchmarks.memory_cell FOLDER`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.model import activation_memory
from orchestrator.train.loop import StepReport, train
from tests.invariant.worker import Answer, Task, engine_of, main, train_context


class _Quiet:
    """A callback that records losses only."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    stop_requested = False

    def on_step_end(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def on_evaluate(self, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        pass

    def on_save(self, engine: Any, step: int) -> None:
        pass


class OnDisk(torch.autograd.graph.saved_tensors_hooks):
    """Replaces `save_on_cpu` on CPU, where device and host memory are the same: saves tensors to disk."""

    moved_bytes = 0
    _folder = Path(tempfile.gettempdir())
    _files = 0

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(self._pack, self._unpack)

    @classmethod
    def _pack(cls, tensor: Tensor) -> tuple[Path, tuple[int, ...]]:
        cls._files += 1
        path = cls._folder / f"activation-{os.getpid()}-{cls._files}.bin"
        array = tensor.detach().numpy()
        array.tofile(path)
        cls.moved_bytes += array.nbytes
        return path, tuple(tensor.shape)

    @staticmethod
    def _unpack(packed: tuple[Path, tuple[int, ...]]) -> Tensor:
        path, shape = packed
        tensor = torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(shape)
        path.unlink()
        return tensor


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(task: Task) -> Answer:
    """Train a task and return its peak memory on top of the memory that the engine holds before, in bytes.

    With `budget_bytes` in the task, RLIMIT_DATA limits further allocations, so that a larger pack runs out of
    memory as on a device.
    """
    activation_memory.save_on_cpu = OnDisk  # type: ignore[misc, assignment]
    engine = engine_of(task)
    context, callback = train_context(task, engine.module), _Quiet()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident set size
    if budget := task.get("budget_bytes"):
        limit = _status("VmData") + budget
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    started = time.perf_counter()
    train(engine, context, callback)
    seconds = time.perf_counter() - started
    engine.destroy()
    return {
        "peak_bytes": _status("VmHWM") - before,
        "moved_bytes": OnDisk.moved_bytes,
        "seconds": seconds,
        "losses": callback.losses,
    }, {}


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"measure": measure})
    sys.stdout.flush()
    os._exit(0)
