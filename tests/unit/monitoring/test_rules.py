"""Prometheus rules are valid, tested, documented, and use existing metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.metrics import catalogue
from tests.conftest import ROOT
from tests.support.prometheus import MONITORING

RULES = [
    {**rule, "group": group["name"]}
    for file in sorted((MONITORING / "rules").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def promtool(*arguments: str) -> str:
    """Run promtool, which must succeed, and return its output."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names_in(expression: str) -> set[str]:
    """Return the metric names in a query: of runs, recording rules and DCGM."""
    return set(re.findall(r"(?:run:|rank:)?\b(?:orchestrator|DCGM)_[A-Za-z0-9_]+(?::\w+)?", expression))


def labels_in(expression: str) -> set[str]:
    """Return the labels by which a query groups and matches."""
    lists = re.findall(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label.strip() for names in lists for label in names.split(",") if label.strip()}


@pytest.mark.process
def test_configuration_is_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", str(MONITORING / "prometheus.yml"))


@pytest.mark.process
def test_rules_are_valid() -> None:
    output = promtool("check", "rules", *map(str, sorted((MONITORING / "rules").glob("*.yml"))))
    assert f"{len(ALERTS)} rules found" in output
    assert "duplicate" not in output


@pytest.mark.process
@pytest.mark.parametrize("file", sorted((MONITORING / "tests").glob("*.yml")), ids=lambda file: file.name)
def test_alerts_fire_if_and_only_if_they_should(file: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    text = "".join(file.read_text() for file in (MONITORING / "tests").glob("*.yml"))
    scenarios = re.split(r"(?m)^  - name: ", text)[1:]
    for alert in (rule["alert"] for rule in ALERTS):
        fires = [scenario for scenario in scenarios if f'alertname="{alert}"' in scenario]
        assert fires, f"{alert} is never tested firing"
        assert any("exp_samples: []" in scenario for scenario in fires), f"{alert} is never tested not firing"
    assert text.count("stale'") > 10


def test_every_metric_in_a_rule_exists() -> None:
    found = {name for rule in RULES for name in names_in(rule["expr"])}
    assert found - RECORDED <= catalogue.sample_names()
    assert len(found) > 10


def test_rules_group_by_existing_labels_and_not_by_attempt() -> None:
    known = {*catalogue.RANK_LABELS, *catalogue.PHASE_LABELS, "cluster"}
    assert {label for rule in RULES for label in labels_in(rule["expr"])} <= known
    groups = {rule["record"]: labels_in(rule["expr"]) for rule in RULES if "record" in rule}
    assert all("attempt" not in labels for name, labels in groups.items() if name.startswith("run:"))


def test_recorded_names_start_with_their_level() -> None:
    assert all(re.fullmatch(r"(run|rank):orchestrator_\w+:\w+", name) for name in RECORDED)
    assert len(RECORDED) == sum("record" in rule for rule in RULES)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_the_runbook_explains_every_alert(alert: dict[str, Any]) -> None:
    name, annotations = alert["alert"], alert["annotations"]
    assert annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    _, _, rest = RUNBOOK.partition(f"\n## {name}\n\n")
    paragraph = rest.split("\n## ")[0].strip()
    assert len(paragraph) > 200, f"docs/runbook.md has no paragraph on {name}"
    assert "\n\n" not in paragraph
    assert "{{ $labels.run }}" in annotations["summary"]
    assert "$value" in annotations["summary"]
    assert alert["labels"]["severity"] in {"critical", "warning"}


def test_the_runbook_has_no_other_alerts() -> None:
    headings = re.findall(r"(?m)^## (\w+)$", RUNBOOK)
    assert sorted(headings) == sorted(alert["alert"] for alert in ALERTS)


def test_settings_in_the_runbook_exist() -> None:
    schema = json.loads((ROOT / "launch" / "jobs" / "job.schema.json").read_text())
    sections = {
        name: set(schema["$defs"][part["$ref"].rsplit("/", 1)[1]]["properties"])
        for name, part in schema["properties"].items()
        if "$ref" in part
    }
    named = re.findall(r"`(model|data|parallel|optim|checkpoint|run|metrics)\.(\w+)[`:]", RUNBOOK)
    assert len(named) > 8
    assert [pair for pair in named if pair[1] not in sections[pair[0]]] == []
