"""The endpoint as Prometheus sees it: scraped over HTTP."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import ClusterError
from orchestrator.metrics import catalogue
from orchestrator.metrics.exporter import Exporter, RankLabels

RANKS = (RankLabels("10.0.0.1", "0", "0"), RankLabels("10.0.0.2", "1", "3"))
INFO = {"zero_stage": 3, "sequence_parallel_size": 1, "world_size": 2, "dtype": "bf16", "device": "H100"}
ROWS = [{"tgs": 100.0, "tokens": 50.0}, {"tgs": 200.0, "tokens": 70.0}]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter("my-run", "127.0.0.1", 0)
    yield made
    made.close()


def scrape(exporter: Exporter) -> list[Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def series(exporter: Exporter, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Return each series of a metric by its labels."""
    full = catalogue.PREFIX + name
    return {tuple(sorted(s.labels.items())): s.value for s in scrape(exporter) if s.name == full}


def labels(**of: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "my-run", "attempt": "0", **of}.items()))


def test_each_rank_has_its_series_with_all_labels(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, [1e12, 2e12])
    assert series(exporter, "tgs") == {
        labels(node="10.0.0.1", rank="0", gpu="0"): 100.0,
        labels(node="10.0.0.2", rank="1", gpu="3"): 200.0,
    }


def test_run_series_stand_once_and_rank_values_among_them_are_passed_over(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_run({"loss": 2.5, "step": 7, "tgs": 150.0, "unheard_of": 1.0})
    assert series(exporter, "loss") == {labels(): 2.5}
    assert series(exporter, "step") == {labels(): 7.0}
    assert series(exporter, "tgs") == {}
    assert series(exporter, "unheard_of") == {}


def test_run_values_among_a_ranks_are_passed_over(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks([{**row, "loss": 1.0} for row in ROWS], [0.0, 0.0])
    assert series(exporter, "loss") == {}


def test_counters_add_up_over_steps(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, [1e12, 2e12])
    exporter.set_ranks(ROWS, [1e12, 3e12])
    assert sorted(series(exporter, "processed_tokens_total").values()) == [100.0, 140.0]
    assert sorted(series(exporter, "processed_flops_total").values()) == [2e12, 5e12]


def test_the_info_series_says_how_the_run_is_spread(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, {**INFO, "more": "is passed over"})
    expected = {name: str(value) for name, value in INFO.items()}
    assert series(exporter, "run_info") == {labels(**expected): 1.0}


def test_a_new_attempt_withdraws_the_series_of_the_one_before(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, [1e12, 2e12])
    exporter.set_run({"loss": 2.5})
    exporter.begin_attempt(1, RANKS[:1], {**INFO, "world_size": 1})
    assert (
        series(exporter, "tgs")
        == series(exporter, "loss")
        == series(exporter, "processed_tokens_total")
        == {}
    )
    assert len(series(exporter, "run_info")) == 1
    exporter.set_ranks(ROWS[:1], [1e12])
    exporter.set_run({"loss": 2.0})
    assert series(exporter, "loss") == {labels(attempt="1"): 2.0}
    ours = [sample for sample in scrape(exporter) if sample.name.startswith(catalogue.PREFIX)]
    assert ours
    assert all(sample.labels["attempt"] == "1" for sample in ours)


def test_every_metric_of_the_catalogue_can_be_set(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS[:1], INFO)
    every = {metric.name: 1.0 for metric in (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS)}
    exporter.set_run(every)
    exporter.set_ranks([every], [1.0])
    found = {sample.name.removeprefix(catalogue.PREFIX) for sample in scrape(exporter)}
    assert set(every) <= found


def test_rows_must_match_ranks(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    with pytest.raises(ValueError, match="zip"):
        exporter.set_ranks(ROWS[:1], [1e12])


def test_two_runs_do_not_share_series(exporter: Exporter) -> None:
    other = Exporter("other", "127.0.0.1", 0)
    try:
        exporter.begin_attempt(0, RANKS, INFO)
        exporter.set_run({"loss": 2.5})
        assert series(other, "loss") == {}
    finally:
        other.close()


def test_a_port_that_is_taken_is_an_error_of_the_machines(exporter: Exporter) -> None:
    with pytest.raises(
        ClusterError, match=rf"metrics\.port={exporter.port} on 127\.0\.0\.1 cannot be opened"
    ):
        Exporter("other", "127.0.0.1", exporter.port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a" * 70 + ".org", "é" * 64])
def test_an_address_that_is_not_this_machines_is_an_error_too(host: str) -> None:
    with pytest.raises(ClusterError, match="cannot be opened"):
        Exporter("run", host, 0)


def test_a_closed_endpoint_frees_its_port() -> None:
    made = Exporter("run", "127.0.0.1", 0)
    port = made.port
    made.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
