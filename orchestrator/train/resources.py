"""Free resources of the cluster: a run waits for what another job is about to give back."""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray

from orchestrator.errors import ClusterError
from orchestrator.run.resolve import ResolvedJob, format_gib

_POLL_SECONDS = 0.5
_TIMEOUT_SECONDS = 30.0


def wait_for_resources(resolved: ResolvedJob) -> None:
    """Wait until CPUs, GPUs and memory for all workers are free.

    Raises:
        ClusterError: Other jobs still use them after 30 seconds.
    """
    workers = resolved.job.parallel.workers
    _wait_until_free({name: workers * amount for name, amount in resolved.worker_resources.items()})


def _wait_until_free(needed: Mapping[str, float]) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        free = ray.available_resources()
        short = [
            f"{name}: {_amount(name, free.get(name, 0))} free of {_amount(name, amount)} needed"
            for name, amount in needed.items()
            if free.get(name, 0) < amount
        ]
        if not short:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"not enough free resources: other jobs are using them ({'; '.join(short)}); wait for these "
                "jobs, or stop one"
            )
        time.sleep(_POLL_SECONDS)


def _amount(name: str, number: float) -> str:
    return format_gib(number) if name == "memory" else f"{number:g}"
