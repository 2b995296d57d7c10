"""Grafana's JSON: `python -m orchestrator.dashboards.grafana` writes it with the extra `dashboards`."""

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
    """Return the text of each dashboard by the name of its file."""
    return {f"{board.uid}.json": _text(_dashboard(board).build()) for board in BOARDS}


def _text(built: models.Dashboard) -> str:
    for variable in built.templating.list_val or []:
        # The SDK writes fields of interval variables into all of them; Grafana's own schema refuses them.
        variable.auto = variable.auto_count = variable.auto_min = None
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _dashboard(board: Board) -> dashboard.Dashboard:
    made = (
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
        made = made.with_variable(_variable(variable))
    numbers = count(1)  # links to a panel stay right
    for section in board.sections:
        made = made.with_row(dashboard.Row(section.title).id(next(numbers)))
        for panel in section.panels:
            made = made.with_panel(_panel(panel).id(next(numbers)))
    return made


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
        .all_value(".*")  # also where nobody sets the label
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | table.Panel:
    made: timeseries.Panel | stat.Panel | table.Panel
    if panel.kind == "stat":
        latest = common.ReduceDataOptions().calcs(["lastNotNull"])
        made = stat.Panel().color_mode(common_models.BigValueColorMode.VALUE).reduce_options(latest)
    elif panel.kind == "table":
        made = table.Panel()
    else:
        legend = (
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
        made = timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(5).span_nulls(False)
    made = (
        made.title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(_SOURCE)
        .height(_HEIGHTS[panel.kind])
        .span(panel.width)
    )
    for place, query in enumerate(panel.queries):
        made = made.with_target(_target(query, chr(ord("A") + place), panel.kind))
    return made


def _target(query: Query, name: str, kind: str) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).ref_id(name).datasource(_SOURCE)
    if kind == "table":
        return made.instant().format(PromQueryFormat.TABLE)
    made = made.legend_format(query.legend)
    return (
        made.instant() if kind == "stat" else made.range()
    )  # the latest value of a range may be of a dead run


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
