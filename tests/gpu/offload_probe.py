"""Trains two steps in one process on a device, and reports on which devices the optimizer state is stored.

`test_offload.py` starts it as `python -m tests.gpu.offload_probe TASK DEVICE`; it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist


class _Deaf:
    """A callback that ignores every event and saves no checkpoint."""

    stop_requested = False

    def on_step_end(self, report: object) -> None:
        pass

    def on_evaluate(self, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        pass

    def on_save(self, engine: object, step: int) -> None:
        pass


def main(task_file: Path, device: str) -> None:
    """Train the task on `device` and print optimizer type, moment bytes and devices as JSON."""
    os.environ["DS_ACCELERATOR"] = device
    from orchestrator.engine.deepspeed_engine import join_process_group, parameter_count, start_engine
    from orchestrator.model.build import build_model
    from orchestrator.parallel.deepspeed_config import render
    from orchestrator.train.loop import train
    from tests.invariant import probe
    from tests.invariant.worker import job_of, train_context

    on_gpu = device == "cuda"
    task = json.loads(task_file.read_text(encoding="utf-8"))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    join_process_group(120)
    job = job_of(task)
    config = render(job, "bf16", "cuda" if on_gpu else "cpu")
    engine = start_engine(build_model(job, torch.bfloat16, config), config)
    context = replace(train_context(task, engine.module), device=torch.device(device))
    train(engine, context, _Deaf())
    found = {
        **probe.optimizer_state(engine),
        "parameters": parameter_count(engine.module),
        "device_bytes": torch.cuda.memory_allocated() if on_gpu else 0,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
