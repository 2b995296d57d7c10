"""Formats predictions, changes and suggestions for people and for error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.planner.estimate import MEMORY_RANGE, TIME_RANGE, Prediction
from orchestrator.planner.plan import Suggestion

GIB = 2**30


def format_prediction(prediction: Prediction) -> str:
    """Return verdict, memory, step time and throughput on one line, each with its error range."""
    memory_range = MEMORY_RANGE[prediction.calibrated]
    capacity_gib = prediction.capacity_bytes / GIB
    text = f"{prediction.verdict}: {prediction.peak_bytes / GIB:.1f} GiB ± {memory_range:.0%}"
    text += f" of {capacity_gib:.1f}"
    if prediction.host_bytes_per_node > GIB:
        host_bytes = prediction.host_capacity_bytes
        text += f", host {prediction.host_bytes_per_node / GIB:.0f} GiB per node"
        text += f" of {host_bytes / GIB:.0f}" if host_bytes else ""
    if prediction.time is None:
        return text  # the catalogue has no peak FLOP/s for this device
    time_range = TIME_RANGE[prediction.calibrated]
    text += f"; {format_seconds(prediction.time.total)} s per step ± {time_range:.0%}"
    text += f", TGS {prediction.tgs:,.0f}"
    tflops = prediction.tflops or 0.0
    text += f", {tflops:.0f} TFLOP/s" if tflops >= 10 else f", {tflops:.2g} TFLOP/s"
    return text + (f", MFU {prediction.mfu:.0%}" if prediction.mfu is not None else "")


def format_changes(changes: Mapping[str, object]) -> str:
    """Return changes to a job as command line options."""
    if not changes:
        return "as written"
    return " ".join(
        f"--set {name}={format_value(value)}" if "." in name else f"{name} {value}"
        for name, value in changes.items()
    )


def format_value(value: object) -> str:
    """Return a value in YAML notation."""
    return "null" if value is None else str(value)


def format_seconds(seconds: float) -> str:
    """Return seconds with three significant digits, or as an integer from 100 on."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def format_suggestions(suggestions: Sequence[Suggestion]) -> list[str]:
    """Return the changes that would make a job fit, one per line."""
    if not suggestions:
        return ["No configuration that was tried fits."]
    lines = [
        f"  {format_changes(suggestion.changes)}: {format_prediction(suggestion.candidate.prediction)}"
        for suggestion in suggestions
    ]
    return ["It would fit with:", *lines]
