"""What runs on this machine measured, kept so that later plans are calibrated.

Lines of JSON in a file of the user's; `ORCHESTRATOR_CALIBRATION` names another one, or none where it is
empty. A run has a line after its first steps and another one at its end, of which the last counts. A stack is
a device with the method and libraries that it ran.
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

PLACE = "ORCHESTRATOR_CALIBRATION"
_DEFAULT = "~/.cache/orchestrator/calibration.jsonl"
_KEPT = 40
"""Runs of a stack that are used: the last ones."""


@dataclass(frozen=True)
class Observation:
    """A run's parts as predicted without constants, and what it measured.

    Attributes:
        run: Which run it is.
        stack: From `software_stack_of`.
        memory: Bytes by part.
        peak_bytes: What a worker held at its peak, without what is offloaded into the same memory.
        steps: Seconds by part; None where they could not be predicted.
        seconds: Of a step; None where they were not measured on the same work.
        spans_nodes: Whether there were several nodes.
    """

    run: str
    stack: str
    memory: GpuMemory
    peak_bytes: float
    steps: MicroSteps | None
    seconds: float | None
    spans_nodes: bool


def software_stack_of(work: Workload, cluster: ClusterSpec) -> str:
    """Return the name of a stack: what two constants for memory and two for time belong to."""
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed"))
    network = " between nodes" if work.world_size > cluster.gpus_per_node else ""
    return f"{cluster.device.name}{network}, {work.quantization} {work.method}, {libraries}"


def remember(observation: Observation) -> None:
    """Add a run to those of this machine; a place that cannot be written is passed over."""
    _append(asdict(observation))


def recall(stack: str) -> list[Observation]:
    """Return the last runs of a stack; lines that cannot be read are passed over."""
    found: dict[str, Observation] = {}
    for entry in _entries():
        try:
            if entry["stack"] == stack:
                seen = _observation(entry)
                found.pop(seen.run, None)
                found[seen.run] = seen
        except (KeyError, TypeError, ValueError):
            continue
    return list(found.values())[-_KEPT:]


def cpu_rates(workers: int, threads: int, measure: Callable[[int, int], CpuRates]) -> CpuRates | None:
    """Return how fast this machine's processors are, measured once; None where nothing is kept.

    Args:
        workers: Processes at a time.
        threads: Of each.
        measure: Measures it.
    """
    if _place() is None:
        return None
    key = {"processor": socket.gethostname(), "workers": workers, "threads": threads}
    for entry in _entries():
        try:
            if {name: entry[name] for name in key} == key:
                return CpuRates(**entry["rates"])
        except (KeyError, TypeError):
            continue
    try:
        rates = measure(workers, threads)
    except (OSError, ValueError, SubprocessError):
        return None  # a machine that has no process to spare is planned without its speed
    _append({**key, "rates": asdict(rates)})
    return rates


def load_calibration(stack: str, without: str | None = None) -> CalibrationParams:
    """Return what is known of a stack: constants fitted to its runs here, or those of none.

    Args:
        stack: From `software_stack_of`.
        without: A run that is left out: one that goes on is not predicted from what it measured itself.
    """
    runs = [each for each in recall(stack) if each.run != without]
    if not runs:
        return CalibrationParams()
    timed = [(each.steps, each.seconds) for each in runs if each.steps and each.seconds]
    spans = any(each.spans_nodes for each in runs)
    return CalibrationParams(
        memory=fit_memory([(each.memory, each.peak_bytes) for each in runs]),
        time=fit_time([(predicted_seconds(steps, spans), seconds) for steps, seconds in timed], spans),
        calibrated=True,
    )


def observed(
    run: str, stack: str, plain: Prediction, steps: MicroSteps | None, measured: Mapping[str, Any]
) -> Observation:
    """Return a run as an observation.

    Args:
        run: Which it is.
        stack: Its stack.
        plain: Its prediction without constants, for the documents that it really had.
        steps: Its seconds by part.
        measured: Its report, or as much of one as its first steps give.
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
    place = _place()
    try:
        lines = place.read_text(encoding="utf-8").splitlines() if place else []
    except (OSError, UnicodeError):
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _append(entry: Mapping[str, Any]) -> None:
    place = _place()
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError:
        return


def _place() -> Path | None:
    named = os.environ.get(PLACE, _DEFAULT)
    return Path(named).expanduser() if named else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
