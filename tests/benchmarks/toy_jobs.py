"""Predict and measure twelve small jobs on this machine, each with parameters fitted to the other eleven.

    python -m tests.benchmarks.toy_jobs [--json]

Runs the sweep toy_jobs.yaml (about ten minutes on two cores; a second call reuses existing results), measures
the speed of the CPU, and fits the planner's two parameters for memory and two for time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from orchestrator.arch.hf_config import load_config_json
from orchestrator.bench.runner import run_cells
from orchestrator.bench.sweep import load
from orchestrator.cluster.hardware import Device
from orchestrator.config import loader
from orchestrator.planner.calibration import MemoryParams, fit_memory, fit_time, predicted_seconds
from orchestrator.planner.cpu_benchmark import cpu_device, measure
from orchestrator.planner.estimate import PROCESS_BYTES, workload_from_job
from orchestrator.planner.memory import GpuMemory, gpu_memory, host_memory_of_workload
from orchestrator.planner.step_time import MicroSteps, micro_steps
from orchestrator.planner.workload import Model
from tests.benchmarks.environment import describe, say

SWEEP = Path(__file__).with_suffix(".yaml")
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """Predicted parts and measurements of one job.

    Attributes:
        name: The fields that differ between cells, with their values.
        memory: Predicted memory by part, in bytes.
        offloaded_bytes: Bytes of offloaded tensors, which are in the same memory on CPU.
        steps: Predicted micro-step time by part, in seconds.
        peak_bytes: Measured peak resident memory, maximum over workers.
        seconds: Measured median step time.
    """

    name: str
    memory: GpuMemory
    offloaded_bytes: float
    steps: MicroSteps
    peak_bytes: float
    seconds: float


def cell_of(fields: Mapping[str, Any], job_text: str, row: Any, devices: Mapping[int, Device]) -> Cell:
    """Return the cell of a sweep row, with its predicted parts."""
    job = loader.parse(job_text)
    config = load_config_json(job.model.path)
    model = Model.from_config(config)
    assert model is not None
    work = workload_from_job(job, config, model, job.parallel.workers, "cpu")
    return Cell(
        name=", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in fields.items()),
        memory=gpu_memory(work, PROCESS_BYTES, collectives_bytes=0.0),
        offloaded_bytes=host_memory_of_workload(work).held,
        steps=micro_steps(work, devices[job.parallel.workers]),
        peak_bytes=row.peaks["memory_peak_bytes"],
        seconds=median(row.samples["step_seconds"]),
    )


def predicted(cell: Cell, others: list[Cell]) -> tuple[float, float]:
    """Return the predicted bytes and seconds of a cell, with parameters fitted to the others."""
    memory = fit_memory([(each.memory, each.peak_bytes - each.offloaded_bytes) for each in others])
    time = fit_time([(predicted_seconds(each.steps, False), each.seconds) for each in others], False)
    return memory.peak(cell.memory) + cell.offloaded_bytes, cell.steps.step(time).total


def compare(cells: list[Cell]) -> dict[str, Any]:
    """Return measurement, prediction and error of each cell, each left out of its own fit."""
    rows = []
    for cell in cells:
        size, seconds = predicted(cell, [each for each in cells if each is not cell])
        plain = MemoryParams().peak(cell.memory) + cell.offloaded_bytes
        rows.append(
            {
                "cell": cell.name,
                "memory_mib": cell.peak_bytes / MIB,
                "memory_predicted_mib": size / MIB,
                "memory_error": size / cell.peak_bytes - 1,
                "memory_error_uncalibrated": plain / cell.peak_bytes - 1,
                "step_seconds": cell.seconds,
                "step_predicted_seconds": seconds,
                "step_error": seconds / cell.seconds - 1,
            }
        )
    errors = {
        f"{name}_median_error": median(abs(row[f"{name}_error"]) for row in rows)
        for name in ("memory", "step")
    }
    return {"rows": rows, **errors}


def main() -> None:
    """Run the missing cells of the sweep and print predictions and errors, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wanted = load(SWEEP, [])
    rows = run_cells(wanted, None, _tell, False)
    devices = {workers: cpu_device(8.0, measure(workers)) for workers in (1, 2)}
    found = compare([cell_of(row.fields, yaml.safe_dump(row.job), row, devices) for row in rows])
    rates = {workers: _rates(device) for workers, device in devices.items()}
    if arguments.json:
        say(json.dumps({**found, "processors": rates, "environment": describe("numpy", "torch")}))
        return
    for row in found["rows"]:
        memory = _beside(row["memory_mib"], row["memory_predicted_mib"], "MiB")
        say(f"{memory}  {_beside(row['step_seconds'], row['step_predicted_seconds'], 's')}  {row['cell']}")
    errors = [f"{name} {found[f'{name}_median_error']:.1%}" for name in ("memory", "step")]
    say(f"median errors, each cell left out of its own fit: {', '.join(errors)}")
    say(f"rates of a process by number of processes: {rates}; {describe('numpy', 'torch')}")


def _rates(device: Device) -> str:
    flops, moved = device.peak_flops("fp32") or 0.0, device.memory_bandwidth_gb_per_second
    return f"{flops / 1e9:.0f} GFLOP/s, {moved:.1f} GB/s"


def _beside(measured: float, predicted: float, unit: str) -> str:
    return f"{measured:7.4g} {unit}, predicted {predicted:7.4g} ({predicted / measured - 1:+4.0%})"


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
