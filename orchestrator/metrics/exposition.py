"""Formats per-rank series in the Prometheus text format.

prometheus_client keeps one object per series, which is too slow for thousands of ranks (docs/adr/0007). Here
a metric of all ranks is one array, formatted at scrape time. The format is version 0.0.4 of
https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np

from orchestrator.metrics.meter import FloatArray


def format_labels(names: Sequence[str], values: Sequence[str]) -> str:
    """Return labels in braces with escaped values."""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def header(name: str, kind: Literal["gauge", "counter"], description: str) -> str:
    """Return the HELP and TYPE lines of a metric."""
    text = description.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def samples(name: str, labels: Sequence[str], values: FloatArray) -> str:
    """Return one sample line per value; NaN means unknown and is omitted."""
    pairs = zip(labels, values.tolist(), strict=True)
    if np.isfinite(values).all():
        return "".join([f"{name}{label} {value!r}\n" for label, value in pairs])
    return "".join([f"{name}{label} {_number(value)}\n" for label, value in pairs if not math.isnan(value)])


class Histogram:
    """Prometheus histogram.

    Args:
        bounds: Increasing upper bounds of the buckets without +Inf.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0

    def observe(self, values: Sequence[float] | FloatArray) -> None:
        """Add observations; a value equal to a bound is counted in its bucket."""
        buckets = np.searchsorted(self._bounds, values, side="left")
        self._counts = self._counts + np.bincount(buckets, minlength=len(self._counts))
        self._sum += float(np.sum(values))

    @property
    def sum(self) -> float:
        """Sum of all observations."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return each upper bound with its cumulative count."""
        bounds = [*(repr(bound) for bound in self._bounds.tolist()), "+Inf"]
        return list(zip(bounds, accumulate(self._counts.tolist()), strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
