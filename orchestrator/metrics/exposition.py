"""The series of thousands of ranks in Prometheus' text format.

The client library holds one object a series, which at thousands of ranks costs more than a step may take
(docs/adr/0007); here a metric of all ranks is one array, and text is made of it when somebody asks. The
format is version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np

from orchestrator.metrics.meter import FloatArray


def labelled(names: Sequence[str], values: Sequence[str]) -> str:
    """Return labels in braces, their values escaped."""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def header(name: str, kind: Literal["gauge", "counter"], meaning: str) -> str:
    """Return the two lines that stand before the samples of a metric."""
    text = meaning.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def samples(name: str, labels: Sequence[str], values: FloatArray) -> str:
    """Return a sample for each value; NaN is what is not known, and gets none."""
    pairs = zip(labels, values.tolist(), strict=True)
    if np.isfinite(values).all():
        return "".join([f"{name}{label} {value!r}\n" for label, value in pairs])
    return "".join([f"{name}{label} {_number(value)}\n" for label, value in pairs if not math.isnan(value)])


class Histogram:
    """Counts observations by bucket.

    Args:
        bounds: Upper bounds of the buckets, rising; the last one, infinity, is added.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0

    def observe(self, values: Sequence[float] | FloatArray) -> None:
        """Count values; one that equals a bound belongs to its bucket."""
        places = np.searchsorted(self._bounds, values, side="left")
        self._counts = self._counts + np.bincount(places, minlength=len(self._counts))
        self._sum += float(np.sum(values))

    @property
    def sum(self) -> float:
        """Sum of all observations."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return each upper bound with the number of observations up to it."""
        bounds = [*(repr(bound) for bound in self._bounds.tolist()), "+Inf"]
        return list(zip(bounds, accumulate(self._counts.tolist()), strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
