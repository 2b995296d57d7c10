"""Plans in words, for people and for errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.planner.estimate import MEMORY_RANGE, TIME_RANGE, Prediction
from orchestrator.planner.search import Remedy

GIB = 2**30


def figures(prediction: Prediction) -> str:
    """Return what a job needs and takes, with ranges."""
    off, slow = MEMORY_RANGE[prediction.calibrated], TIME_RANGE[prediction.calibrated]
    capacity = prediction.capacity_bytes / GIB
    said = f"{prediction.verdict}: {prediction.peak_bytes / GIB:.1f} GiB ± {off:.0%} of {capacity:.1f}"
    if prediction.host_bytes_per_node > GIB:
        host = prediction.host_capacity_bytes
        said += f", host {prediction.host_bytes_per_node / GIB:.0f} GiB a node"
        said += f" of {host / GIB:.0f}" if host else ""
    if prediction.time is None:
        return said  # the catalogue has no peak of this device
    said += f"; {seconds_text(prediction.time.total)} s a step ± {slow:.0%}, TGS {prediction.tgs:,.0f}"
    tflops = prediction.tflops or 0.0
    said += f", {tflops:.0f} TFLOP/s" if tflops >= 10 else f", {tflops:.2g} TFLOP/s"
    return said + (f", MFU {prediction.mfu:.0%}" if prediction.mfu is not None else "")


def changed(changes: Mapping[str, Any]) -> str:
    """Return changes of a job as options of the command line."""
    if not changes:
        return "as written"
    return " ".join(
        f"--set {name}={word(value)}" if "." in name else f"{name} {value}" for name, value in changes.items()
    )


def word(value: Any) -> str:
    """Return a value as a job file writes it."""
    return "null" if value is None else str(value)


def seconds_text(seconds: float) -> str:
    """Return seconds with three figures, or whole."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def remedy_lines(remedies: Sequence[Remedy]) -> list[str]:
    """Return what would make a job fit, a line each."""
    if not remedies:
        return ["nothing that could be tried makes it fit"]
    return ["it would fit with:"] + [
        f"  {changed(each.changes)}: {figures(each.candidate.prediction)}" for each in remedies
    ]
