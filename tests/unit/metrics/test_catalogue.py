"""One name and one meaning for every number, and no number without a name."""

import re
from dataclasses import fields

from orchestrator.metrics import catalogue
from orchestrator.metrics.meter import RankStep, rank_values, step_values

STEP = RankStep(*[1.0] * len(fields(RankStep)))
EVERY = (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS, *catalogue.COUNTERS, catalogue.INFO)


def test_names_are_unique_and_fit_for_prometheus() -> None:
    names = [metric.name for metric in EVERY]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", catalogue.PREFIX + name) for name in names)
    # Prometheus appends these itself, and two series would meet in one name.
    appended = ("_total", "_created", "_count", "_sum", "_bucket")
    assert [name for name in names if name.endswith(appended)] == []


def test_every_metric_says_what_it_is_in_one_sentence() -> None:
    assert all(metric.help.endswith((".", "1.")) and metric.help[0].isalpha() for metric in EVERY)


def test_every_number_of_the_meter_is_in_the_catalogue() -> None:
    ranks = {metric.name for metric in catalogue.STEP_METRICS if metric.scope == "rank"}
    known = {metric.name for metric in catalogue.STEP_METRICS}
    assert set(rank_values(STEP, 1.0, 1e12)) <= ranks
    assert set(step_values([STEP], 1.0, [1e12])) <= known


def test_every_rank_metric_is_given_by_the_meter() -> None:
    ranks = {metric.name for metric in catalogue.STEP_METRICS if metric.scope == "rank"}
    assert ranks == set(rank_values(STEP, 1.0, 1e12))


def test_labels() -> None:
    assert set(catalogue.RUN_LABELS) < set(catalogue.RANK_LABELS)
    assert catalogue.RANK_LABELS == ("run", "attempt", "node", "rank", "gpu")
    for labels in (catalogue.RANK_LABELS, catalogue.RUN_LABELS, catalogue.INFO_LABELS):
        assert {"job", "instance"}.isdisjoint(labels)  # Prometheus writes these itself
        assert len(set(labels)) == len(labels)
