"""With two nodes and a Prometheus, all queries have correct data, which disappear in time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.monitored import CLUSTER, Monitored, monitored_run
from tests.cluster.pictures import draw
from tests.support.prometheus import needs_prometheus
from tests.unit.monitoring.test_dashboards import PANELS, substituted
from tests.unit.monitoring.test_rules import ALERTS, RECORDED

pytestmark = [pytest.mark.cluster, pytest.mark.ray, needs_prometheus]
# A CPU has no peak in the catalogue, no device memory and no DCGM; tests/unit/monitoring covers these.
NEEDS_A_GPU = re.compile(r"orchestrator_(mfu|hfu|memory_limit_bytes)|DCGM_")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    with monitored_run(tmp_path_factory.mktemp("monitored")) as seen:
        yield seen


@pytest.mark.parametrize("panel", PANELS)
def test_every_query_of_a_panel_returns_data(seen: Monitored, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = substituted(target["expr"])
        found = seen.prometheus.ask(query, at=seen.steady)
        assert bool(found) != bool(NEEDS_A_GPU.search(query)), f"{query} finds {found}"
        assert all(series["metric"].get("cluster", CLUSTER) == CLUSTER for series in found)


def test_every_recording_rule_returns_data(seen: Monitored) -> None:
    empty = {name for name in RECORDED if not seen.prometheus.ask(name, at=seen.steady)}
    assert empty == {"run:orchestrator_mfu:avg"}, "a CPU has no peak"


def test_every_alert_is_evaluated_and_none_fires_on_a_healthy_run(seen: Monitored) -> None:
    rules = seen.prometheus.rules()
    assert {rule["name"]: rule["health"] for rule in rules if rule["type"] == "alerting"} == {
        alert["alert"]: "ok" for alert in ALERTS
    }
    assert seen.prometheus.ask('ALERTS{alertstate="firing"}', at=seen.steady) == []


def test_tgs_in_prometheus_equals_the_report(seen: Monitored) -> None:
    hour = f"[{seen.ended - seen.begun:.0f}s]"
    tokens = f"sum(max_over_time(orchestrator_processed_tokens_total{hour}))"
    seconds = f"sum(max_over_time(orchestrator_processed_seconds_total{hour}))"
    (found,) = seen.prometheus.ask(f"{tokens} / {seconds} / 2", at=seen.ended)
    report = seen.report()
    assert float(found["value"][1]) == pytest.approx(report["tgs"], rel=0.02)
    recorded = seen.prometheus.range("run:orchestrator_tgs:steps5m", seen.begun, seen.ended, 1.0)
    assert float(recorded[0]["values"][-1][1]) == pytest.approx(report["tgs"], rel=0.1), (
        "over the last minutes"
    )


def test_ranks_of_both_nodes_have_their_own_series(seen: Monitored) -> None:
    found = seen.prometheus.ask("orchestrator_tgs", at=seen.steady)
    assert {(each["metric"]["rank"], each["metric"]["attempt"]) for each in found} == {("0", "1"), ("1", "1")}
    assert {each["metric"]["node"] for each in found} == set(seen.nodes)


def test_series_of_a_killed_worker_end_and_restarts_increase(seen: Monitored) -> None:
    assert seen.withdrawn - seen.killed < 20
    killed = seen.prometheus.range('orchestrator_tgs{attempt="1"}', seen.begun, seen.ended, 1.0)
    assert len(killed) == 2
    assert max(float(series["values"][-1][0]) for series in killed) <= seen.withdrawn
    assert seen.prometheus.ask('orchestrator_tgs{attempt="1"}', at=seen.withdrawn) == []
    (restarts,) = seen.prometheus.range("max(orchestrator_restarts)", seen.begun, seen.ended, 1.0)
    values = [float(value) for _, value in restarts["values"]]
    assert (values[0], values[-1]) == (0.0, 1.0)
    (missing,) = seen.prometheus.ask(
        f"max_over_time(run:orchestrator_ranks_missing:count[{seen.ended - seen.killed:.0f}s])", at=seen.ended
    )
    assert missing["value"][1] == "2"
    again = seen.prometheus.range('orchestrator_tgs{attempt="2"}', seen.killed, seen.ended, 1.0)
    assert {series["metric"]["rank"] for series in again} == {"0", "1"}
    assert seen.report()["restarts"] == 1


def test_the_panels_can_be_drawn(seen: Monitored) -> None:
    picture = draw(seen)
    assert picture.count("No data") == 2, "MFU, and the share of a device's memory"
    assert "Tokens per GPU per second, last step" in picture
