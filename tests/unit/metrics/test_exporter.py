"""The metrics endpoint, scraped over HTTP."""

import gzip
import math
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import ClusterError
from orchestrator.metrics import catalogue
from orchestrator.metrics.exporter import Exporter, RankLabels

RANKS = (RankLabels("10.0.0.1", "0", "0"), RankLabels("10.0.0.2", "1", "3"))
INFO = {"zero_stage": 3, "sequence_parallel_size": 1, "world_size": 2, "dtype": "bf16", "device": "H100"}
ROWS = {"tgs": np.array([100.0, 200.0]), "tokens": np.array([50.0, 70.0])}
FIRST = {name: column[:1] for name, column in ROWS.items()}

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
    """Return the values of a metric by labels."""
    full = catalogue.PREFIX + name
    return {tuple(sorted(s.labels.items())): s.value for s in scrape(exporter) if s.name == full}


def labels(**of: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "my-run", "attempt": "0", **of}.items()))


def test_each_evaluation_set_is_a_series_of_the_total(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_run({"evaluation_loss": 2.0})
    exporter.set_evaluation_sets({"code": 1.5, 'a"b': 3.0})
    expected = {labels(): 2.0, labels(eval_set="code"): 1.5, labels(eval_set='a"b'): 3.0}
    assert series(exporter, "evaluation_loss") == expected
    exporter.end_attempt()
    assert series(exporter, "evaluation_loss") == expected
    exporter.begin_attempt(1, RANKS, INFO)
    assert series(exporter, "evaluation_loss") == {}


def test_each_rank_has_a_series_with_all_labels(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.array([1e12, 2e12]), 2.0)
    assert series(exporter, "tgs") == {
        labels(node="10.0.0.1", rank="0", gpu="0"): 100.0,
        labels(node="10.0.0.2", rank="1", gpu="3"): 200.0,
    }


def test_set_run_ignores_rank_metrics_and_unknown_names(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_run({"loss": 2.5, "step": 7, "tgs": 150.0, "unheard_of": 1.0})
    assert series(exporter, "loss") == {labels(): 2.5}
    assert series(exporter, "step") == {labels(): 7.0}
    assert series(exporter, "tgs") == {}
    assert series(exporter, "unheard_of") == {}


def test_set_ranks_ignores_run_metrics(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks({**ROWS, "loss": np.array([1.0, 1.0])}, np.array([0.0, 0.0]), 2.0)
    assert series(exporter, "loss") == {}


def test_counters_add_up_over_steps(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.array([1e12, 2e12]), 2.0)
    exporter.set_ranks(ROWS, np.array([1e12, 3e12]), 2.0)
    assert sorted(series(exporter, "processed_tokens_total").values()) == [100.0, 140.0]
    assert sorted(series(exporter, "processed_flops_total").values()) == [2e12, 5e12]


def test_the_info_series_has_the_parallel_configuration(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, {**INFO, "more": "is ignored"})
    expected = {name: str(value) for name, value in INFO.items()}
    assert series(exporter, "run_info") == {labels(**expected): 1.0}


def test_a_new_attempt_removes_the_series_of_the_previous_one(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.array([1e12, 2e12]), 2.0)
    exporter.set_run({"loss": 2.5})
    exporter.begin_attempt(1, RANKS[:1], {**INFO, "world_size": 1})
    assert series(exporter, "tgs") == series(exporter, "loss") == {}
    only = labels(attempt="1", node="10.0.0.1", rank="0", gpu="0")
    assert series(exporter, "processed_tokens_total") == {only: 0.0}
    assert len(series(exporter, "run_info")) == 1
    exporter.set_ranks(FIRST, np.array([1e12]), 2.0)
    exporter.set_run({"loss": 2.0})
    assert series(exporter, "loss") == {labels(attempt="1"): 2.0}
    ours = [sample for sample in scrape(exporter) if sample.name.startswith(catalogue.PREFIX)]
    assert ours
    assert all(sample.labels["attempt"] == "1" for sample in ours)


def test_every_metric_of_the_catalogue_can_be_set(exporter: Exporter) -> None:
    exporter.begin_attempt(0, [RankLabels("10.0.0.1", "0", "0", 80e9)], INFO)
    every = (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS)
    exporter.set_run({metric.name: 1.0 for metric in every})
    exporter.set_ranks({metric.name: np.ones(1) for metric in every}, np.ones(1), 2.0)
    assert {sample.name for sample in scrape(exporter)} == catalogue.sample_names()


def test_columns_must_have_one_value_per_rank(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    with pytest.raises(ValueError, match="tgs has 1 values for 2 ranks"):
        exporter.set_ranks(FIRST, np.array([1e12, 1e12]), 2.0)
    assert series(exporter, "tgs") == {}


def test_unknown_values_have_no_series_and_older_values_are_removed(
    exporter: Exporter,
) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks({**ROWS, "mfu": np.array([0.4, 0.5])}, np.zeros(2), 2.0)
    exporter.set_ranks({**ROWS, "mfu": np.array([0.4, math.nan])}, np.zeros(2), 2.0)
    assert list(series(exporter, "mfu").values()) == [0.4]
    exporter.set_ranks(ROWS, np.zeros(2), 2.0)
    assert series(exporter, "mfu") == {}


def test_nan_and_infinity_are_exported(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_run({"loss": math.nan, "gradient_norm": math.inf})
    assert math.isnan(series(exporter, "loss")[labels()])
    assert series(exporter, "gradient_norm") == {labels(): math.inf}


def test_the_device_memory_is_exported_if_known(exporter: Exporter) -> None:
    exporter.begin_attempt(0, [RankLabels("10.0.0.1", "0", "0", 80e9), RANKS[1]], INFO)
    assert series(exporter, "memory_limit_bytes") == {}
    exporter.set_ranks(ROWS, np.zeros(2), 2.0)
    limit = {labels(node="10.0.0.1", rank="0", gpu="0"): 80e9}
    assert series(exporter, "memory_limit_bytes") == limit


def test_counters_start_at_zero_before_the_first_step(exporter: Exporter) -> None:
    """Prometheus' `increase` ignores the first value of a series, which would drop the first step."""
    exporter.begin_attempt(0, RANKS, INFO)
    assert list(series(exporter, "processed_tokens_total").values()) == [0.0, 0.0]
    assert series(exporter, "skipped_steps_total") == {labels(): 0.0}
    exporter.count({"skipped_steps": 1.0})
    exporter.count({"skipped_steps": 0.0})
    assert series(exporter, "skipped_steps_total") == {labels(): 1.0}


def test_step_seconds_are_counted_with_tokens(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.zeros(2), 2.0)
    exporter.set_ranks(ROWS, np.zeros(2), 3.0)
    assert series(exporter, "processed_seconds_total") == {labels(): 5.0}
    exporter.begin_attempt(1, RANKS, INFO)
    assert series(exporter, "processed_seconds_total") == {labels(attempt="1"): 0.0}


def test_after_an_attempt_only_lasting_metrics_and_counters_remain(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.array([1e12, 2e12]), 2.0)
    exporter.set_run({"loss": 2.5, "step": 7, "world_size": 2, "last_step_timestamp_seconds": 1e9})
    exporter.end_attempt()
    assert series(exporter, "tgs") == series(exporter, "loss") == series(exporter, "tokens") == {}
    assert series(exporter, "step") == {labels(): 7.0}
    assert series(exporter, "world_size") == {labels(): 2.0}
    assert series(exporter, "last_step_timestamp_seconds") == {labels(): 1e9}
    assert sorted(series(exporter, "processed_tokens_total").values()) == [50.0, 70.0]


def test_phase_histogram_buckets_include_their_upper_bound(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.observe("forward", np.array([0.1, 0.11]))
    exporter.observe("forward", [1000.0])
    buckets = {
        dict(key)["le"]: value
        for key, value in series(exporter, "step_phase_seconds_bucket").items()
        if dict(key)["phase"] == "forward"
    }
    assert buckets["0.03"] == 0.0
    assert buckets["0.1"] == 1.0
    assert buckets["0.3"] == buckets["300.0"] == 2.0
    assert buckets["+Inf"] == 3.0
    key = labels(phase="forward")
    assert series(exporter, "step_phase_seconds_count")[key] == 3.0
    assert series(exporter, "step_phase_seconds_sum")[key] == pytest.approx(1000.21)
    assert series(exporter, "step_phase_seconds_count")[labels(phase="data")] == 0.0


def test_the_phase_histogram_has_no_rank_label(exporter: Exporter) -> None:
    many = [RankLabels("10.0.0.1", str(rank), "0") for rank in range(100)]
    exporter.begin_attempt(0, many, INFO)
    buckets = len(series(exporter, "step_phase_seconds_bucket"))
    assert buckets == len(catalogue.PHASES) * (len(catalogue.PHASE_BOUNDS_SECONDS) + 1)


def test_labels_with_quotes_backslashes_and_newlines_are_escaped(exporter: Exporter) -> None:
    odd = 'a"b\\c\nd'
    exporter.begin_attempt(0, [RankLabels(odd, "0", "")], {**INFO, "device": odd})
    exporter.set_ranks(FIRST, np.zeros(1), 2.0)
    assert series(exporter, "tgs") == {labels(node=odd, rank="0", gpu=""): 100.0}
    assert [dict(key)["device"] for key in series(exporter, "run_info")] == [odd]


def test_gzip_responses_have_the_same_content(exporter: Exporter) -> None:
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.zeros(2), 2.0)
    address = f"http://127.0.0.1:{exporter.port}/metrics"
    request = urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        body = answer.read()
    text = gzip.decompress(body).decode()
    assert text == exporter.text()
    assert len(body) < len(text) / 3


def test_other_paths_return_404(exporter: Exporter) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/else", timeout=10)


@pytest.mark.process
def test_promtool_accepts_the_metrics(exporter: Exporter) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    exporter.begin_attempt(0, RANKS, INFO)
    exporter.set_ranks(ROWS, np.zeros(2), 2.0)
    exporter.set_run({"loss": 2.5})
    done = subprocess.run(
        [promtool, "check", "metrics"], input=exporter.text(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_two_runs_do_not_share_series(exporter: Exporter) -> None:
    other = Exporter("other", "127.0.0.1", 0)
    try:
        exporter.begin_attempt(0, RANKS, INFO)
        exporter.set_run({"loss": 2.5})
        assert series(other, "loss") == {}
    finally:
        other.close()


def test_a_port_in_use_is_a_cluster_error(exporter: Exporter) -> None:
    with pytest.raises(
        ClusterError, match=rf"metrics\.port={exporter.port} on 127\.0\.0\.1 cannot be opened"
    ):
        Exporter("other", "127.0.0.1", exporter.port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a" * 70 + ".org", "é" * 64])
def test_an_address_of_another_machine_is_a_cluster_error(host: str) -> None:
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


def test_a_scrape_in_the_middle_of_updates_shows_one_step_of_all_ranks(exporter: Exporter) -> None:
    many = [RankLabels("10.0.0.1", str(rank), "0") for rank in range(500)]
    exporter.begin_attempt(0, many, INFO)
    done = Event()

    def update() -> None:
        value = 0.0
        while not done.is_set():
            value += 1.0
            exporter.set_ranks({"tgs": np.full(500, value), "tokens": np.ones(500)}, np.ones(500), 2.0)

    thread = Thread(target=update)
    thread.start()
    try:
        seen = []
        for _ in range(20):
            lines = [line for line in exporter.text().splitlines() if line.startswith("orchestrator_tgs{")]
            seen.append({line.rsplit(" ", 1)[1] for line in lines})
    finally:
        done.set()
        thread.join()
    assert all(len(values) <= 1 for values in seen)
    assert len(set(map(frozenset, seen))) > 1, "the values never changed, so nothing was tested"


def test_a_scrape_during_the_end_of_an_attempt_is_consistent(exporter: Exporter) -> None:
    done = Event()

    def turn_over() -> None:
        number = 0
        while not done.is_set():
            number += 1
            exporter.begin_attempt(number, RANKS, INFO)
            exporter.set_ranks(ROWS, np.zeros(2), 2.0)
            exporter.end_attempt()

    thread = Thread(target=turn_over)
    thread.start()
    try:
        for _ in range(200):
            samples = [s for f in text_string_to_metric_families(exporter.text()) for s in f.samples]
            assert len({sample.labels["attempt"] for sample in samples}) <= 1
            assert sum(sample.name == "orchestrator_tgs" for sample in samples) in (0, 2)
    finally:
        done.set()
        thread.join()
