"""Draws the panels of "Runs and throughput" in Grafana's layout from a real run.

`python -m tests.cluster.pictures` trains it on two nodes, kills a worker on the way, and writes
docs/figures/dashboard.svg.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from tests.cluster.monitored import Monitored, monitored_run
from tests.conftest import ROOT
from tests.unit.monitoring.test_dashboards import DASHBOARDS, substituted

TARGET = ROOT / "docs" / "figures" / "dashboard.svg"
_BACKGROUND, _PANEL, _TEXT, _QUIET = "#111217", "#181b1f", "#ccccdc", "#8e8e99"
_COLOURS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#fade2a")
_UNITS = {
    "s": ("s", 1.0),
    "bytes": ("MiB", 2.0**-20),
    "percentunit": ("%", 100.0),
    "short": ("", 1.0),
    "none": ("", 1.0),
    "sci": ("", 1.0),
}
_STEP_SECONDS = 2.0
_Found = list[tuple[str, list[tuple[float, float]]]]


def draw(seen: Monitored) -> str:
    """Return the panels as SVG; panels without data are marked."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawn = [
        (panel, _series(seen, panel))
        for panel in DASHBOARDS["orchestrator-runs.json"]["panels"]
        if panel["type"] in {"timeseries", "stat"}
    ]
    first = min(points[0][0] for _, found in drawn for _, points in found) - 3.0
    rows = sorted({panel["gridPos"]["y"] for panel, _ in drawn})
    height = sum(_height(drawn, row) for row in rows)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dashboard", "font.size": 7.5}):
        figure = plt.figure(figsize=(15, height), facecolor=_BACKGROUND)
        top = height
        for row in rows:
            size = _height(drawn, row)
            for panel, found in drawn:
                if panel["gridPos"]["y"] == row:
                    place = panel["gridPos"]
                    left, wide = place["x"] / 24, place["w"] / 24
                    box = (left + 0.028, (top - size + 0.42) / height, wide - 0.036, (size - 0.85) / height)
                    axes = _framed(figure.add_axes(box), panel)
                    if panel["type"] == "stat":
                        _latest(axes, panel, found, seen)
                    else:
                        _lines(axes, panel, found, seen, first)
            top -= size
        text = io.StringIO()
        figure.savefig(text, format="svg", facecolor=_BACKGROUND, metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


def _height(drawn: list[tuple[dict[str, Any], Any]], row: int) -> float:
    tallest = max(panel["gridPos"]["h"] for panel, _ in drawn if panel["gridPos"]["y"] == row)
    return 0.3 * float(tallest) + 0.3


def _series(seen: Monitored, panel: dict[str, Any]) -> _Found:
    found = []
    for target in panel["targets"]:
        query = substituted(target["expr"])
        for series in seen.prometheus.range(query, seen.begun, seen.ended, _STEP_SECONDS):
            name = target.get("legendFormat", "")
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(float(at) - seen.begun, float(value)) for at, value in series["values"]]
            found.append((name.removeprefix("run ").replace(" gpu {{gpu}}", ""), points))
    return found


def _framed(axes: Any, panel: dict[str, Any]) -> Any:
    axes.set_facecolor(_PANEL)
    unit, _ = _unit(panel)
    axes.set_title(panel["title"] + (f" [{unit}]" if unit else ""), loc="left", color=_TEXT, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _unit(panel: dict[str, Any]) -> tuple[str, float]:
    """Return the displayed unit of a panel and the factor for its values."""
    name = panel["fieldConfig"]["defaults"]["unit"].removeprefix("suffix: ")
    return _UNITS.get(name, (name, 1.0))


def _latest(axes: Any, panel: dict[str, Any], found: _Found, seen: Monitored) -> None:
    """Draw the value of a stat panel before the kill."""
    _, scale = _unit(panel)
    _, points = found[0]
    value = [value for at, value in points if at <= seen.steady - seen.begun][-1] * scale
    axes.set_xticks([])
    axes.set_yticks([])
    text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"
    axes.text(0.5, 0.45, text, ha="center", va="center", color=_COLOURS[0], fontsize=19)


def _lines(axes: Any, panel: dict[str, Any], found: _Found, seen: Monitored, first: float) -> None:
    """Draw a time series panel with a dotted line at the kill."""
    if not found:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "No data (trained on CPU)", ha="center", va="center", color=_QUIET)
        return
    _, scale = _unit(panel)
    for number, (name, points) in enumerate(found):
        at, values = _with_gaps(points)
        scaled = [value * scale for value in values]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(at, scaled, color=colour, linewidth=1.1, label=textwrap.shorten(name, 44))
    axes.axvline(seen.killed - seen.begun, color="#f2495c", linewidth=0.8, linestyle=":")
    axes.set_xlim(first, seen.ended - seen.begun)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_QUIET, length=0)
    axes.grid(color="#2c3235", linewidth=0.5)
    columns = min(len(found), 4 if panel["gridPos"]["w"] > 8 else 3)
    legend = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.09), "ncols": columns, "frameon": False}
    axes.legend(**legend, labelcolor=_TEXT, fontsize=6.5)


def _with_gaps(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return times and values with NaN in gaps, so that lines are interrupted as in Grafana."""
    at, values = [points[0][0]], [points[0][1]]
    for (earlier, _), (later, value) in itertools.pairwise(points):
        if later - earlier > 1.5 * _STEP_SECONDS:
            at.append(earlier + _STEP_SECONDS)
            values.append(float("nan"))
        at.append(later)
        values.append(value)
    return at, values


def main() -> None:
    """Run the job, draw the panels and write the file."""
    with tempfile.TemporaryDirectory() as home, monitored_run(Path(home), steps=120) as seen:
        text = draw(seen)
        report = seen.report()
    TARGET.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{TARGET}: {report['steps']} steps, {report['tgs']:.1f} tokens/s a worker\n")


if __name__ == "__main__":
    main()
