"""Dashboards are complete, use existing metrics, and have valid queries."""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.dashboards import devices, panels
from orchestrator.dashboards.prometheus_rules import TARGET, prometheus_rule
from orchestrator.metrics import catalogue
from tests.support.prometheus import MONITORING
from tests.unit.monitoring.test_rules import RECORDED, labels_in, names_in, promtool

FOLDER = MONITORING / "grafana" / "dashboards"
DASHBOARDS = {file.name: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
QUERIES = [target["expr"] for param in PANELS for target in param.values[0]["targets"]]
VARIABLES = [
    variable
    for dashboard in DASHBOARDS.values()
    for variable in dashboard["templating"]["list"]
    if variable["type"] == "query"
]
UNITS = {"short", "none", "s", "bytes", "mbytes", "percent", "percentunit", "watt", "celsius", "sci"}


def substituted(expression: str) -> str:
    """Return a query as Grafana sends it with all values selected."""
    return re.sub(r"\$(cluster|run|node|rank)\b", ".*", expression).replace("$__rate_interval", "1m")


def test_both_dashboards_exist() -> None:
    boards = (panels.RUNS, devices.CLUSTER)
    assert {f"{board.uid}.json": board.title for board in boards} == {
        name: dashboard["title"] for name, dashboard in DASHBOARDS.items()
    }
    assert len(PANELS) == sum(len(section.panels) for board in boards for section in board.sections)
    assert len(PANELS) > 30


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_title_description_and_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS or unit.startswith("suffix: ")
    assert panel["targets"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C", "D"][: len(panel["targets"])]


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_queries_existing_metrics_and_uses_the_variables(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        names = names_in(target["expr"])
        assert names
        assert names - RECORDED - set(devices.DCGM) <= catalogue.sample_names()
        known = {*catalogue.RANK_LABELS, *catalogue.PHASE_LABELS, *catalogue.EVAL_SET_LABELS}
        known |= {"le", "cluster"}
        assert labels_in(target["expr"]) <= known
        assert '$cluster"' in target["expr"]
        shown = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
        assert shown <= known
        grouped = re.match(r"(?:sum|max|avg|count) by \(([^)]*)\)", target["expr"])
        if grouped:
            assert shown <= {label.strip() for label in grouped.group(1).split(",")}


def test_queries_of_single_ranks_are_limited_to_ten() -> None:
    """A graph with 4,096 lines is unreadable."""
    ranks = [
        target
        for param in PANELS
        for target in param.values[0]["targets"]
        if "{{rank}}" in target.get("legendFormat", "")
    ]
    assert len(ranks) > 8
    assert all(re.match(r"(top|bottom)k\(10, ", target["expr"]) for target in ranks)


def test_titles_and_ids_are_unique_and_panels_do_not_overlap() -> None:
    for dashboard in DASHBOARDS.values():
        titles = [panel["title"] for panel in dashboard["panels"]]
        numbers = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(titles)) == len(titles)
        assert len(set(numbers)) == len(numbers)
        covered = [
            (x, y)
            for panel in dashboard["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(covered)) == len(covered)
        assert max(x for x, _ in covered) < 24


def test_variables_are_used_and_match_absent_labels() -> None:
    for dashboard in DASHBOARDS.values():
        names = {variable["name"] for variable in dashboard["templating"]["list"]}
        assert names == {"datasource", "cluster", "run", "node", "rank"}
        text = json.dumps(dashboard["panels"])
        assert [name for name in names - {"datasource"} if f"${name}" not in text] == []
    assert {variable["allValue"] for variable in VARIABLES} == {".*"}
    for variable in VARIABLES:
        assert names_in(variable["query"]) <= catalogue.sample_names() | set(devices.DCGM)
        assert variable["query"].endswith(f", {variable['name']})")


@pytest.mark.process
def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:query:{number}", "expr": substituted(query)}
        for number, query in enumerate(QUERIES)
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in promtool("check", "rules", str(file))


def test_files_match_the_code() -> None:
    if util.find_spec("grafana_foundation_sdk") is None:
        pytest.skip("grafana-foundation-sdk is missing: pip install -e .[dashboards]")
    from orchestrator.dashboards.grafana import files

    assert {file.name: file.read_text() for file in FOLDER.glob("*.json")} == files()


def test_the_prometheus_rule_matches_the_rule_files() -> None:
    """Regenerate with `python -m orchestrator.dashboards.prometheus_rules`."""
    assert TARGET.read_text() == prometheus_rule()


def test_provisioning_refers_to_existing_files() -> None:
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["datasources"][0]["jsonData"]["timeInterval"] == scraped
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/orchestrator.yaml").read_text())
    assert provider["providers"][0]["type"] == "file"
    kustomization = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())
    listed = {Path(file).name for file in kustomization["configMapGenerator"][0]["files"]}
    assert listed == set(DASHBOARDS)
    assert all((MONITORING / file).exists() for file in kustomization["resources"])
