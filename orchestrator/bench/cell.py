"""Runs one cell of a sweep in its own driver process, and writes its outcome.

Started by `orchestrator.bench.runner` as `python -m orchestrator.bench.cell FOLDER`. It stops when the sweep
process exits, which closes its standard input.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import shutdown
from orchestrator.bench import environment
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.console_log import console_log
from orchestrator.errors import ClusterError, MemoryExhaustedError, OrchestratorError

_logger = logging.getLogger(__name__)
INSTRUCTIONS, OUTCOME = "cell.json", "outcome.json"


def main(folder: Path) -> None:
    """Run the cell described by cell.json in a run directory, and write outcome.json there."""
    shutdown.install()
    console_log(sys.stderr)
    with shutdown.interruptible("the cell is run again when the sweep is"):
        try:
            _run(folder)
        except KeyboardInterrupt:
            if shutdown.received() is None:
                raise
            shutdown.leave()


def _run(folder: Path) -> None:
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    from orchestrator.atomic_files import write_json
    from orchestrator.run.worker_config import BenchmarkRun
    from orchestrator.train.driver import run

    asked: dict[str, Any] = json.loads((folder / INSTRUCTIONS).read_text(encoding="utf-8"))
    job = loader.parse(asked["job"])
    outcome: dict[str, object] = {"status": "ok", "reason": None}
    try:
        run(job, asked["address"], lambda status: None, BenchmarkRun(asked["memory_limit_bytes"]))
    except MemoryExhaustedError as error:
        outcome = {"status": "out_of_memory", "reason": "; ".join(error.problems)}
    except OrchestratorError as error:
        outcome = {"status": "failed", "reason": "; ".join(error.problems)}
        outcome["machines"] = isinstance(error, ClusterError)
    except Exception as error:  # a failed cell must not stop the sweep
        _logger.exception("the cell failed")
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    outcome["shape"] = _shape(job) if outcome["status"] == "ok" else None
    outcome["environment"] = {**environment.describe(), **_accelerator()}
    write_json(folder / OUTCOME, outcome)


def _end_with_the_sweep() -> None:
    """Send SIGTERM to this process once standard input is closed, as happens if the sweep is killed."""
    while os.read(0, 1):  # nobody writes; sys.stdin would be locked when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _shape(job: JobSpec) -> dict[str, int] | None:
    from orchestrator.arch.model_dims import ModelDims
    from orchestrator.model.build import load_config

    shape = ModelDims.from_config(load_config(job.model).get_text_config().to_dict())
    return asdict(shape) if shape else None


def _accelerator() -> dict[str, str]:
    """Return the CUDA and NCCL versions of torch; empty for a CPU build."""
    import torch

    if not torch.version.cuda:
        return {}
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl))}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
