"""Stores measurements of runs on this machine, so that later predictions are calibrated.

The store is a JSON Lines file in the user's cache; `ORCHESTRATOR_CALIBRATION` sets another path, or disables
the store if empty. A run appends a line after its first steps and one at its end; the last one counts. Lines
of another format, from older versions too, are ignored. A software stack is a device, method and library
versions.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.planner.calibration import fit_memory, fit_time, predicted_seconds
from orchestrator.planner.cpu_benchmark import CpuRates
from orchestrator.planner.estimate import CalibrationParams, Prediction
from orchestrator.planner.memory import GpuMemory
from orchestrator.planner.step_time import MicroSteps, StepTime
from orchestrator.planner.workload import Workload

PATH_VARIABLE = "ORCHESTRATOR_CALIBRATION"
_DEFAULT = "~/.cache/orchestrator/calibration.jsonl"
_MAX_RUNS = 40
"""Number of most recent runs of a software stack that are used."""


@dataclass(frozen=True)
class Observation:
    """Uncalibrated prediction of a run by part, with its measurements.

    Attributes:
        run: Identifies the run.
        stack: Software stack, from `software_stack_of`.
        memory: Predicted bytes by part.
        peak_bytes: Measured peak of a worker, without state offloaded to the same memory.
        steps: Predicted seconds by part; None if the catalogue lacks rates of the device.
        seconds: Measured step time; None if steps is None.
        spans_nodes: Whether the run used several nodes.
    """

    run: str
    stack: str
    memory: GpuMemory
    peak_bytes: float
    steps: MicroSteps | None
    seconds: float | None
    spans_nodes: bool


def software_stack_of(work: Workload, cluster: ClusterSpec) -> str:
    """Return the name of a software stack: device, network, method and library versions."""
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed"))
    network = " between nodes" if work.world_size > cluster.gpus_per_node else ""
    return f"{cluster.device.name}{network}, {work.quantization} {work.method}, {libraries}"


def remember(observation: Observation) -> None:
    """Append a run to the store; does nothing if the file cannot be written."""
    _append(asdict(observation))


def recall(stack: str) -> list[Observation]:
    """Return the most recent runs of a software stack; unreadable lines are ignored."""
    runs: dict[str, Observation] = {}
    for entry in _entries():
        try:
            if entry["stack"] == stack:
                observation = _observation(entry)
                runs.pop(observation.run, None)  # moves the run to the end
                runs[observation.run] = observation
        except (KeyError, TypeError, ValueError):
            continue
    return list(runs.values())[-_MAX_RUNS:]


def cpu_rates(workers: int, threads: int, measure: Callable[[int, int], CpuRates]) -> CpuRates | None:
    """Return the measured rates of this machine's CPU, benchmarked once; None if the store is disabled.

    Args:
        workers: Number of concurrent processes.
        threads: Threads per process.
        measure: Runs the benchmark.
    """
    if _path() is None:
        return None
    key = {"cpu_host": socket.gethostname(), "workers": workers, "threads": threads}
    for entry in _entries():
        try:
            if {name: entry[name] for name in key} == key:
                return CpuRates(**entry["rates"])
        except (KeyError, TypeError):
            continue
    try:
        rates = measure(workers, threads)
    except (OSError, ValueError, SubprocessError):
        return None  # without rates only the memory is predicted
    _append({**key, "rates": asdict(rates)})
    return rates


def load_calibration(stack: str, without: str | None = None) -> CalibrationParams:
    """Return calibration parameters fitted to stored runs of a software stack, or the defaults.

    Args:
        stack: Software stack, from `software_stack_of`.
        without: Run to leave out; a resumed run is not predicted from its own measurements.
    """
    runs = [run for run in recall(stack) if run.run != without]
    if not runs:
        return CalibrationParams()
    timed = [(run.steps, run.seconds) for run in runs if run.steps and run.seconds]
    spans = any(run.spans_nodes for run in runs)
    return CalibrationParams(
        memory=fit_memory([(run.memory, run.peak_bytes) for run in runs]),
        time=fit_time([(predicted_seconds(steps, spans), seconds) for steps, seconds in timed], spans),
        calibrated=True,
    )


def observed(
    run: str, stack: str, plain: Prediction, steps: MicroSteps | None, measured: Mapping[str, Any]
) -> Observation:
    """Return the observation of a run.

    Args:
        run: Identifies the run.
        stack: Its software stack.
        plain: Its uncalibrated prediction for the actual document lengths.
        steps: Predicted seconds by part.
        measured: Its report.json, or the same fields after its first steps.
    """
    on_device = measured["memory_reserved_peak_bytes"]
    return Observation(
        run=run,
        stack=stack,
        memory=plain.memory,
        peak_bytes=on_device - plain.offloaded_bytes + plain.unallocated_bytes,
        steps=steps,
        seconds=measured["medians"]["step_seconds"] if steps else None,
        spans_nodes=plain.work.world_size > plain.work.gpus_per_node,
    )


def _observation(entry: Mapping[str, Any]) -> Observation:
    steps = entry["steps"]
    return Observation(
        run=entry["run"],
        stack=entry["stack"],
        memory=GpuMemory(**entry["memory"]),
        peak_bytes=float(entry["peak_bytes"]),
        steps=steps and MicroSteps(steps["count"], StepTime(**steps["parts"])),
        seconds=entry["seconds"],
        spans_nodes=bool(entry["spans_nodes"]),
    )


def _entries() -> Iterator[Any]:
    path = _path()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeError):
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _append(entry: Mapping[str, object]) -> None:
    path = _path()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError:
        return


def _path() -> Path | None:
    named = os.environ.get(PATH_VARIABLE, _DEFAULT)
    return Path(named).expanduser() if named else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
