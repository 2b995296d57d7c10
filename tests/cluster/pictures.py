"""Draws the panels of "Runs and throughput" as Grafana would place them, from a run that really happened.

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
_UNITS = {"s": "s", "bytes": "B", "percentunit": "%", "short": "", "none": "", "sci": ""}


def draw(seen: Monitored) -> str:
    """Return the panels that had data, as SVG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawn = [
        (panel, found)
        for panel in DASHBOARDS["orchestrator-runs.json"]["panels"]
        if panel["type"] in {"timeseries", "stat"} and (found := _series(seen, panel))
    ]
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
                    _panel(figure.add_axes(box), panel, found, seen)
            top -= size
        text = io.StringIO()
        figure.savefig(text, format="svg", facecolor=_BACKGROUND, metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


def _height(drawn: list[tuple[dict[str, Any], Any]], row: int) -> float:
    tallest = max(panel["gridPos"]["h"] for panel, _ in drawn if panel["gridPos"]["y"] == row)
    return 0.3 * float(tallest) + 0.3


def _series(seen: Monitored, panel: dict[str, Any]) -> list[tuple[str, list[tuple[float, float]]]]:
    found = []
    for target in panel["targets"]:
        query = substituted(target["expr"])
        for series in seen.prometheus.range(query, seen.begun, seen.ended, 1.0):
            name = target.get("legendFormat", "")
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(float(at) - seen.begun, float(value)) for at, value in series["values"]]
            found.append((name.removeprefix("run ").replace(" gpu {{gpu}}", ""), points))
    return found


def _panel(axes: Any, panel: dict[str, Any], found: list[tuple[str, Any]], seen: Monitored) -> None:
    axes.set_facecolor(_PANEL)
    axes.set_title(panel["title"], loc="left", color=_TEXT, fontsize=9)
    unit = panel["fieldConfig"]["defaults"]["unit"].removeprefix("suffix: ")
    unit = _UNITS.get(unit, unit)
    scale = 100.0 if unit == "%" else 1.0
    for spine in axes.spines.values():
        spine.set_visible(False)
    if panel["type"] == "stat":
        name, points = found[0]
        before = [value for at, value in points if at <= seen.steady - seen.begun]
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.45, f"{before[-1] * scale:,.4g} {unit}", ha="center", va="center", color=_COLOURS[0])
        axes.texts[-1].set_fontsize(19)
        return
    for number, (name, points) in enumerate(found):
        # A second apart is one line; where nothing was known there is a gap, as in Grafana.
        at = [points[0][0]]
        values = [points[0][1] * scale]
        for (earlier, _), (later, value) in itertools.pairwise(points):
            if later - earlier > 1.5:
                at.append(earlier + 1)
                values.append(float("nan"))
            at.append(later)
            values.append(value * scale)
        label = textwrap.shorten(name, 44)
        axes.plot(at, values, color=_COLOURS[number % len(_COLOURS)], linewidth=1.1, label=label)
    axes.axvline(seen.killed - seen.begun, color="#f2495c", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, seen.ended - seen.begun)
    if unit == "s" or min(axes.get_ylim()) > 0:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit, color=_QUIET)
    axes.tick_params(colors=_QUIET, length=0)
    axes.grid(color="#2c3235", linewidth=0.5)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=min(len(found), 4 if panel["gridPos"]["w"] > 8 else 3),
        frameon=False,
        labelcolor=_TEXT,
        fontsize=6.5,
    )


def main() -> None:
    """Train, kill, draw and write."""
    with tempfile.TemporaryDirectory() as home, monitored_run(Path(home), steps=120) as seen:
        text = draw(seen)
        report = seen.report()
    TARGET.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{TARGET}: {report['steps']} steps, {report['tgs']:.1f} tokens/s a worker\n")


if __name__ == "__main__":
    main()
