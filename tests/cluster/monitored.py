"""A run on two nodes that is scraped by an external Prometheus and loses a worker."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.beds import new_bed
from tests.conftest import finish, job_text, start, step_rows, wait_until
from tests.support.prometheus import Prometheus

CLUSTER = "two-nodes"
_TGS_OF_RANK_1 = 'orchestrator_tgs{run="run", rank="1"}'


@dataclass(frozen=True)
class Monitored:
    """The finished run and a Prometheus with its data.

    Attributes:
        prometheus: The server; it no longer scrapes the run.
        folder: The run directory.
        nodes: Addresses of the nodes.
        begun: Unix time before the submission.
        steady: Unix time with all metrics scraped, before the kill.
        killed: Unix time at which worker 1 was killed.
        withdrawn: Unix time at which Prometheus had no rate of worker 1 anymore.
        ended: Unix time after the job.
    """

    prometheus: Prometheus
    folder: Path
    nodes: list[str]
    begun: float
    steady: float
    killed: float
    withdrawn: float
    ended: float

    def report(self) -> dict[str, Any]:
        """Return report.json of the run."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report


@contextmanager
def monitored_run(home: Path, steps: int = 60) -> Iterator[Monitored]:
    """Submit a job, kill worker 1 after a third of its steps, and wait for the end of the job."""
    job = job_text(
        home / "runs",
        optim__max_steps=steps,
        checkpoint__every_steps=5,
        eval={
            "data": {name: {"path": "builtin/alpaca_sample_eval"} for name in ("one", "two")},
            "every_steps": 10,
        },
        metrics__host="0.0.0.0",
        metrics__port=9400,
    )
    (home / "job.yaml").write_text(job)
    run, begun = home / "runs" / "run", time.time()
    with new_bed(2, 1) as bed:
        nodes = bed.addresses
        with Prometheus(home, {"runs.json": [f"{nodes[0]}:9400"]}, CLUSTER) as prometheus:
            process = start("submit", "job.yaml", "--address", bed.dashboard_url, "--no-doctor", cwd=home)
            wait_until(lambda: len(step_rows(run)) >= steps // 3, 300, "a third of the steps done")
            # Recorded series appear after the next rule evaluation.
            wait_until(lambda: prometheus.ask("run:orchestrator_tgs:steps5m"), 30, "rates are recorded")
            time.sleep(3)
            steady = time.time()
            victim = json.loads((run / "workers.json").read_text())[1]
            killed = time.time()
            os.kill(victim["pid"], signal.SIGKILL)
            wait_until(lambda: not prometheus.ask(_TGS_OF_RANK_1), 60, "no rate of the dead worker")
            withdrawn = time.time()
            done = finish(process, timeout=400)
            assert done.code == 0, f"{done.out[-4000:]}\n{done.err[-4000:]}"
            yield Monitored(prometheus, run, nodes, begun, steady, killed, withdrawn, time.time())
