"""Cost of thousands of ranks: a scrape of the endpoint, a step in the recorder, and a step in the loop.

    python -m tests.benchmarks.exporter [--ranks 4096] [--json]

The recorder is a separate actor, so the training loop waits only for the work of rank 0 before it sends its
message: reading the gathered values, computing the loss of the step, and serialization. This is measured with
Ray's serializer and a copy of the buffers, which is the cost of a put into the object store; the actor call
and the collective are not included. The recorder must process a step in less time than the step takes,
otherwise rank 0 waits for it after eight steps. Ratios above 1 exceed the limit.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from orchestrator.metrics.meter import RankStep, RankSteps
from orchestrator.run.recorder import Recorder, WorkerInfo
from orchestrator.run.run_lock import RunLock
from orchestrator.train.loop import StepReport
from orchestrator.train.reporter import step_message
from tests.benchmarks.environment import describe, say

STEP_SECONDS = 0.2
SCRAPE_LIMIT_SECONDS = 1.0
LOOP_LIMIT_SHARE = 0.005
_GPUS_PER_NODE = 8
_TIMES = 15
_INFO = {"zero_stage": 3, "sequence_parallel_size": 1, "dtype": "bf16", "device": "NVIDIA H100 80GB HBM3"}


def workers(ranks: int) -> list[WorkerInfo]:
    """Return the workers of `ranks` ranks on nodes with eight devices."""
    return [
        WorkerInfo(
            rank,
            f"10.{rank // _GPUS_PER_NODE // 256}.{rank // _GPUS_PER_NODE % 256}.7",
            f"node-{rank // _GPUS_PER_NODE}",
            1000 + rank,
            _INFO["device"],
            str(rank % _GPUS_PER_NODE),
            989e12,
            memory_limit_bytes=85_000_000_000,
        )
        for rank in range(ranks)
    ]


def gathered(ranks: int) -> torch.Tensor:
    """Return a gathered tensor of step metrics, shape [ranks, fields of RankStep], with random values."""
    drawn = np.random.default_rng(0).uniform(0.5, 1.5, (ranks, len(fields(RankStep))))
    return torch.from_numpy(drawn * 1e4)


def timed(work: Callable[[], Any]) -> float:
    """Return the median seconds of `_TIMES` calls, after one warm-up call."""
    work()
    seconds = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def loop_seconds(ranks: int) -> float:
    """Return the seconds that rank 0 spends on the metrics of a step."""
    from ray import cloudpickle

    buffer = gathered(ranks)

    def work() -> None:
        report = StepReport(1, 0.1, STEP_SECONDS, 1e-4, 1.0, False, RankSteps(buffer.cpu().numpy()))
        assert report.loss > 0
        parts: list[Any] = []
        cloudpickle.dumps(
            (1, *step_message(report)),
            protocol=5,
            buffer_callback=lambda part: parts.append(bytes(part.raw())),
        )

    return timed(work)


def recorder_seconds(recorder: Recorder, attempt: int, ranks: int) -> float:
    """Return the seconds that the recorder spends on a step."""
    steps, number = RankSteps(gathered(ranks).numpy()), iter(range(1, 10**6))

    def work() -> None:
        report = StepReport(next(number), 0.1, STEP_SECONDS, 1e-4, 1.0, False, steps)
        recorder.record_step(attempt, *step_message(report))

    return timed(work)


def scrape(port: int, encoding: str) -> bytes:
    """Return the response body of a scrape, still compressed if `encoding` is gzip."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept-Encoding": encoding}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        body: bytes = answer.read()
    return body


def measure(ranks: int) -> dict[str, Any]:
    """Measure scrape, recorder and loop, in seconds, MiB and ratios to their limits."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        recorder = Recorder(run_dir, "benchmark", RunLock.acquire(run_dir), "127.0.0.1", 0)
        try:
            attempt = recorder.begin_attempt(workers(ranks), _INFO, 0, 10**6)
            update = recorder_seconds(recorder, attempt, ranks)
            port = recorder.status().metrics_port
            assert port is not None
            plain, packed = (timed(lambda kind=kind: scrape(port, kind)) for kind in ("identity", "gzip"))
            wire = scrape(port, "gzip")
        finally:
            recorder.close()
    text = gzip.decompress(wire).decode()
    loop = loop_seconds(ranks)
    return {
        "ranks": ranks,
        "samples": sum(not line.startswith("#") for line in text.splitlines()),
        "text_mib": len(text) / 2**20,
        "gzip_mib": len(wire) / 2**20,
        "scrape_seconds": plain,
        "scrape_gzip_seconds": packed,
        "recorder_step_seconds": update,
        "loop_step_seconds": loop,
        "scrape_to_limit": max(plain, packed) / SCRAPE_LIMIT_SECONDS,
        "recorder_to_step": update / STEP_SECONDS,
        "loop_to_limit": loop / (LOOP_LIMIT_SHARE * STEP_SECONDS),
    }


def main() -> None:
    """Measure and print one value per line, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {**measure(arguments.ranks), "environment": describe("numpy", "torch", "ray")}
    if arguments.json:
        say(json.dumps(found))
        return
    for name, value in found.items():
        say(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
