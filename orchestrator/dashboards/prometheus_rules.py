"""Writes the PrometheusRule manifest: `python -m orchestrator.dashboards.prometheus_rules`."""

from __future__ import annotations

from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
TARGET = FOLDER / "prometheusrule.yaml"
_HEAD = "# Generated from rules/ by `python -m orchestrator.dashboards.prometheus_rules`; do not edit.\n"


def prometheus_rule() -> str:
    """Return a PrometheusRule with all groups of the rule files."""
    groups = [
        group
        for file in sorted((FOLDER / "rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    ]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "orchestrator",
            "labels": {"app.kubernetes.io/part-of": "orchestrator", "role": "alert-rules"},
        },
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, width=110)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(), encoding="utf-8")
