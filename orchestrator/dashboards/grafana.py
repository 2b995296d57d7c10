"""Writes the Grafana dashboards as JSON: `python -m orchestrator.dashboards.grafana` (extra `dashboards`)."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from orchestrator.dashboards.devices import CLUSTER
from orchestrator.dashboards.panels import RUNS, Board, Panel, Query, Variable

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring" / "grafana" / "dashboards"
BOARDS = (RUNS, CLUSTER)
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHTS = {"graph": 8, "stat": 4, "table": 6}


def files() -> dict[str, str]:
    """Return the JSON of each dashboard by file name."""
    return {f"{board.uid}.json": _text(_dashboard(board).build()) for board in BOARDS}


def _text(built: models.Dashboard) -> str:
    for variable in built.templating.list_val or []:
        # The SDK sets fields of interval variables on all variables, which Grafana's schema rejects.
        variable.auto = variable.auto_count = variable.auto_min = None
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _dashboard(board: Board) -> dashboard.Dashboard:
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["orchestrator"])
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("30s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for variable in board.variables:
        builder = builder.with_variable(_variable(variable))
    numbers = count(1)  # stable panel IDs keep links valid
    for section in board.sections:
        builder = builder.with_row(dashboard.Row(section.title).id(next(numbers)))
        for panel in section.panels:
            builder = builder.with_panel(_panel(panel).id(next(numbers)))
    return builder


def _variable(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.name)
        .query(variable.query)
        .datasource(_SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(
            models.VariableSort.NUMERICAL_ASC
            if variable.name == "rank"
            else models.VariableSort.ALPHABETICAL_ASC
        )
        .multi(True)
        .include_all(True)
        .all_value(".*")  # matches series without the label as well
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | table.Panel:
    builder: timeseries.Panel | stat.Panel | table.Panel
    if panel.kind == "stat":
        latest = common.ReduceDataOptions().calcs(["lastNotNull"])
        builder = stat.Panel().color_mode(common_models.BigValueColorMode.VALUE).reduce_options(latest)
    elif panel.kind == "table":
        builder = table.Panel()
    else:
        legend = (
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
        builder = timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(5).span_nulls(False)
    builder = (
        builder.title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(_SOURCE)
        .height(_HEIGHTS[panel.kind])
        .span(panel.width)
    )
    for index, query in enumerate(panel.queries):
        builder = builder.with_target(_target(query, chr(ord("A") + index), panel.kind))
    return builder


def _target(query: Query, name: str, kind: str) -> prometheus.Dataquery:
    builder = prometheus.Dataquery().expr(query.expr).ref_id(name).datasource(_SOURCE)
    if kind == "table":
        return builder.instant().format(PromQueryFormat.TABLE)
    builder = builder.legend_format(query.legend)
    return (
        builder.instant() if kind == "stat" else builder.range()
    )  # the latest value of a range may be of a finished run


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
