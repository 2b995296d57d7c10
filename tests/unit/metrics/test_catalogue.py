"""The metric catalogue has a unique name and a description for every published metric."""

import re
from dataclasses import fields

from orchestrator.metrics import catalogue
from orchestrator.metrics.meter import RankStep, RankSteps, peaks, rank_columns, step_values

STEP = RankSteps.of([RankStep(*[1.0] * len(fields(RankStep)))])
PEAKS = peaks([1e12])
ALL_METRICS = (
    *catalogue.STEP_METRICS,
    *catalogue.DEVICE_METRICS,
    *catalogue.RUN_METRICS,
    *catalogue.COUNTERS,
    *catalogue.RUN_COUNTERS,
    catalogue.PHASE_SECONDS,
    catalogue.INFO,
)


def test_names_are_unique_and_valid_for_prometheus() -> None:
    names = [metric.name for metric in ALL_METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", catalogue.PREFIX + name) for name in names)
    # Prometheus appends these suffixes, which could make two names equal.
    appended = ("_total", "_created", "_count", "_sum", "_bucket")
    assert [name for name in names if name.endswith(appended)] == []


def test_every_metric_has_a_one_sentence_description() -> None:
    assert all(metric.help.endswith((".", "1.")) and metric.help[0].isalpha() for metric in ALL_METRICS)


def test_all_metrics_of_the_meter_are_in_the_catalogue() -> None:
    ranks = {metric.name for metric in catalogue.STEP_METRICS if metric.scope == "rank"}
    known = {metric.name for metric in catalogue.STEP_METRICS}
    assert set(rank_columns(STEP, 1.0, PEAKS)) <= ranks
    assert set(step_values(STEP, 1.0, PEAKS)) <= known


def test_the_meter_returns_every_rank_metric() -> None:
    ranks = {metric.name for metric in catalogue.STEP_METRICS if metric.scope == "rank"}
    assert ranks == set(rank_columns(STEP, 1.0, PEAKS))


def test_labels() -> None:
    assert set(catalogue.RUN_LABELS) < set(catalogue.RANK_LABELS)
    assert catalogue.RANK_LABELS == ("run", "attempt", "node", "rank", "gpu")
    for labels in (
        catalogue.RANK_LABELS,
        catalogue.RUN_LABELS,
        catalogue.PHASE_LABELS,
        catalogue.INFO_LABELS,
    ):
        assert {"job", "instance"}.isdisjoint(labels)  # set by Prometheus
        assert len(set(labels)) == len(labels)


def test_rates_and_current_values_do_not_outlive_their_attempt() -> None:
    """A rate, loss or memory size would look as if the workers were still training."""
    lasting = {metric.name for metric in ALL_METRICS if metric.lasting}
    assert lasting.isdisjoint({metric.name for metric in ALL_METRICS if metric.scope == "rank"})
    assert lasting.isdisjoint({"loss", "gradient_norm", "learning_rate", "step_seconds", "padding_fraction"})
    assert {"last_step_timestamp_seconds", "world_size", "steps_to_go"} <= lasting


def test_step_phases_have_a_gauge_and_histogram_bounds_are_sorted() -> None:
    gauges = {metric.name for metric in catalogue.STEP_METRICS}
    assert {f"{phase}_seconds" for phase in catalogue.PHASES[:4]} <= gauges
    assert list(catalogue.PHASE_BOUNDS_SECONDS) == sorted(set(catalogue.PHASE_BOUNDS_SECONDS))


def test_sample_names_have_prefix_and_suffix() -> None:
    names = catalogue.sample_names()
    assert {"orchestrator_tgs", "orchestrator_run_info", "orchestrator_processed_tokens_total"} <= names
    assert "orchestrator_step_phase_seconds_bucket" in names
    assert "orchestrator_processed_tokens" not in names
