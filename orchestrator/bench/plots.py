"""Plots of a sweep: memory and TGS over length, scaling over workers, step time by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from orchestrator.bench.layouts import method_name, model_name
from orchestrator.bench.results import Row
from orchestrator.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#555555")
_PHASES = {"data": "#E69F00", "forward": "#56B4E9", "backward": "#0072B2", "optimizer": "#009E73"}
_OTHER = "#CCCCCC"
_LENGTH, _WORKERS = "data.max_length", "parallel.workers"
_MOST_BARS = 40
_LINE_INCHES = 0.18  # height of a legend line
_LONGEST_OF_TWO = 48  # maximum label length, in characters, for a legend with two columns
Series = Mapping[str, Sequence[Row]]


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Write the plots for which a sweep has enough cells.

    Args:
        rows: Results of the sweep.
        folder: Folder for the SVG files.
        title: Title of every plot.

    Returns:
        The files written.

    Raises:
        SpecError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    ran = [row for row in rows if row.status == "ok"]
    wanted: dict[str, Callable[[Axes], None]] = {}
    if _distinct(ran, _LENGTH) > 1:
        wanted["memory_over_length"] = lambda axes: _memory(axes, _series(rows, _LENGTH))
        wanted["tgs_over_length"] = lambda axes: _rate(axes, _series(ran, _LENGTH))
    if _distinct(ran, _WORKERS) > 1:
        wanted["scaling_over_workers"] = lambda axes: _scaling(axes, _series(ran, _WORKERS))
    if ran:
        wanted["step_time_by_phase"] = lambda axes: _phases(axes, ran[:_MOST_BARS])
    files = []
    for name, paint in wanted.items():
        height = max(2.4, 1.4 + 0.34 * len(ran[:_MOST_BARS])) if name == "step_time_by_phase" else 4.6
        figure, axes = pyplot.subplots(figsize=(8.0, height), layout="constrained")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        paint(axes)
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            columns = 1 if max(map(len, labels)) > _LONGEST_OF_TWO else 2
            figure.set_figheight(height + _LINE_INCHES * -(-len(labels) // columns))
            figure.legend(loc="outside lower left", frameon=False, fontsize="small", ncols=columns)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        files.append(path)
    return files


def require_matplotlib(otherwise: str = "leave the plots out with --no-plots") -> None:
    """Check that matplotlib is installed before cells run.

    Args:
        otherwise: The alternative that the error suggests.

    Raises:
        SpecError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise SpecError(
            'plots need matplotlib, which is not installed; install this package with its extra "plots", or '
            + otherwise
        )


def _pyplot() -> ModuleType:
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "bench"  # reproducible SVG files
    from matplotlib import pyplot

    return pyplot


def _distinct(rows: Sequence[Row], field: str) -> int:
    return len({row.setting(field) for row in rows})


def _series(rows: Sequence[Row], across: str) -> dict[str, list[Row]]:
    """Return the rows of every line of a plot by label, sorted by the field on the x axis."""
    name_of = _names(rows, across)
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row)
    return {name: sorted(line, key=lambda row: row.setting(across)) for name, line in found.items()}


def _names(rows: Sequence[Row], across: str | None) -> Callable[[Row], str]:
    """Return a function that labels rows with the fewest fields that distinguish them.

    The field on the x axis is not part of a label. Fields determined by earlier ones are skipped, such as the
    batch size if it depends on the workers.
    """
    fields = dict.fromkeys(field for row in rows for field in row.fields)
    telling: list[Callable[[Row], str]] = [lambda row: str(row.setting(across)) if across else ""]
    for words in (model_name, method_name, *(_words(field) for field in fields if field != across)):
        # Keep a field only if it splits rows that the fields so far label equally.
        with_it = {tuple(each(row) for each in (*telling, words)) for row in rows}
        if len(with_it) > len({tuple(each(row) for each in telling) for row in rows}):
            telling.append(words)
    return lambda row: ", ".join(words(row) for words in telling[1:]) or model_name(row)


def _words(field: str) -> Callable[[Row], str]:
    last = field.rpartition(".")[2]
    return lambda row: f"{last} {row.value(field)}"


def _lines(axes: Axes, series: Series) -> Iterator[tuple[str, Sequence[Row], str]]:
    for at, (name, rows) in enumerate(series.items()):
        yield name, rows, _COLOURS[at % len(_COLOURS)]


def _memory(axes: Axes, series: Series) -> None:
    ceiling = 0.0
    for name, rows, colour in _lines(axes, series):
        ran = [row for row in rows if "memory_peak_bytes" in row.peaks]
        values = [row.peaks["memory_peak_bytes"] / 2**30 for row in ran]
        axes.plot([row.setting(_LENGTH) for row in ran], values, "o-", color=colour, label=name, markersize=4)
        ceiling = max([ceiling, *values])
    label = "out of memory"
    for _, rows, colour in _lines(axes, series):
        for row in rows:
            if row.status == "out_of_memory":
                axes.plot(
                    [row.setting(_LENGTH)],
                    [ceiling * 1.08],
                    color=colour,
                    label=label,
                    marker="X",
                    markersize=9,
                    linestyle="none",
                    markeredgecolor="white",
                )
                label = "_another"
    axes.set_ylim(0.0, ceiling * 1.15 or None)
    _length_axis(axes, series)
    axes.set_ylabel("peak memory of the fullest worker, GiB")


def _rate(axes: Axes, series: Series) -> None:
    for name, rows, colour in _lines(axes, series):
        readings = [(row.setting(_LENGTH), found) for row in rows if (found := row.reading("tgs"))]
        at = [length for length, _ in readings]
        axes.plot(at, [found.median for _, found in readings], "o-", color=colour, label=name, markersize=4)
        low, high = [found.low for _, found in readings], [found.high for _, found in readings]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0.0)
    _length_axis(axes, series)
    axes.set_ylabel("TGS, tokens/GPU/s (band: quartiles)")


def _scaling(axes: Axes, series: Series) -> None:
    label = "in proportion to the fewest workers"
    for name, rows, colour in _lines(axes, series):
        at = [row.setting(_WORKERS) for row in rows]
        totals = [
            found.median * count for row, count in zip(rows, at, strict=True) if (found := row.reading("tgs"))
        ]
        axes.plot(at, totals, "o-", color=colour, label=name, markersize=4)
        if len(at) > 1:
            ideal = [totals[0] / at[0] * count for count in at]
            axes.plot(at, ideal, ":", color=colour, linewidth=1, label=label)
            label = "_another"
    axes.set_ylim(bottom=0.0)
    ticks = sorted({row.setting(_WORKERS) for rows in series.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("workers")
    axes.set_ylabel("tokens/s of all workers together")


def _phases(axes: Axes, rows: Sequence[Row]) -> None:
    name_of = _names(rows, None)
    names = [name_of(row) for row in rows]
    places = range(len(rows))
    left = [0.0] * len(rows)
    whole = [found.median if (found := row.reading("step_seconds")) else 0.0 for row in rows]
    for phase, colour in _PHASES.items():
        readings = [row.reading(f"{phase}_seconds") for row in rows]
        widths = [found.median if found else 0.0 for found in readings]
        axes.barh(places, widths, left=left, color=colour, label=phase, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    rest = [max(0.0, total - used) for total, used in zip(whole, left, strict=True)]
    axes.barh(places, rest, left=left, color=_OTHER, label="between phases, and waiting", height=0.7)
    axes.set_yticks(places, names, fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("median seconds of a step")


def _length_axis(axes: Axes, series: Series) -> None:
    ticks = sorted({row.setting(_LENGTH) for rows in series.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("tokens in a pack")
