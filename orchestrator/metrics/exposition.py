"""Prometheus' text format, written for thousands of ranks at once.

One series a rank as an object of its own costs more than a step may take; here a metric of all ranks is one
array, and text is made of it when somebody asks. The format is version 0.0.4 of
https://prometheus.io/docs/instrumenting/exposition_formats/.
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


def header(name: str, kind: Literal["gauge", "counter", "histogram"], meaning: str) -> str:
    """Return the two lines that stand before the samples of a metric."""
    text = meaning.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def sample(name: str, labels: str, value: float) -> str:
    """Return one sample."""
    return f"{name}{labels} {_number(value)}\n"


def samples(name: str, labels: Sequence[str], values: FloatArray) -> str:
    """Return a sample for each value; NaN is what is not known, and gets none."""
    pairs = zip(labels, values.tolist(), strict=True)
    if np.isfinite(values).all():
        return "".join([f"{name}{label} {value!r}\n" for label, value in pairs])
    return "".join([sample(name, label, value) for label, value in pairs if not math.isnan(value)])


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

    def text(self, name: str, names: Sequence[str], values: Sequence[str]) -> str:
        """Return its samples under a name and labels."""
        bounds = [*(repr(bound) for bound in self._bounds.tolist()), "+Inf"]
        counted = list(accumulate(self._counts.tolist()))
        buckets = [
            f"{name}_bucket{labelled((*names, 'le'), (*values, bound))} {count}\n"
            for bound, count in zip(bounds, counted, strict=True)
        ]
        labels = labelled(names, values)
        return (
            "".join(buckets)
            + sample(f"{name}_sum", labels, self._sum)
            + f"{name}_count{labels} {counted[-1]}\n"
        )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
