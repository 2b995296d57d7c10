"""The Prometheus endpoint of a run: per-rank and per-run series, removed when their attempt ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.errors import ClusterError
from orchestrator.metrics import catalogue, targets
from orchestrator.metrics.catalogue import PREFIX
from orchestrator.metrics.endpoint import AUTO_PORTS, Endpoint, family_of
from orchestrator.metrics.exposition import Histogram, format_labels, header, samples
from orchestrator.metrics.meter import FloatArray
from orchestrator.metrics.targets import TargetFile

_RANK_GAUGES = tuple(
    metric for metric in (*catalogue.STEP_METRICS, *catalogue.DEVICE_METRICS) if metric.scope == "rank"
)
_RUN_GAUGES = tuple(
    metric for metric in (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS) if metric.scope == "run"
)
_RUN_NAMES = frozenset(metric.name for metric in _RUN_GAUGES)
_LASTING = frozenset(metric.name for metric in _RUN_GAUGES if metric.lasting)


@dataclass(frozen=True)
class RankLabels:
    """Labels `node`, `rank` and `gpu` of a worker, and the memory of its device in bytes."""

    node: str
    rank: str
    gpu: str
    memory_limit_bytes: float | None = None


@dataclass(eq=False)
class _Attempt(Collector):
    """Metrics of one attempt. Arrays are replaced, never modified: a scrape may be reading them."""

    run: str
    number: str
    labels: tuple[str, ...] = ()
    memory_limits: FloatArray | None = None
    info: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    evaluation_sets: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, FloatArray] = field(default_factory=dict)
    rank_counters: dict[str, FloatArray] = field(default_factory=dict)
    run_counters: dict[str, float] = field(default_factory=dict)
    phases: dict[str, Histogram] = field(default_factory=dict)

    def text(self) -> str:
        """Return all series as text; per-rank series are formatted without the client library."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode() + "".join(self._rank_series())

    def collect(self) -> Iterator[Metric]:
        """Yield the per-run series; implements prometheus_client's Collector."""
        run_labels = (self.run, self.number)
        for metric in _RUN_GAUGES:
            if metric.name in self.values:
                gauge = GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=catalogue.RUN_LABELS)
                gauge.add_metric(run_labels, self.values[metric.name])
                if metric.name == "evaluation_loss":
                    self._add_evaluation_sets(gauge)
                yield gauge
        for metric in catalogue.RUN_COUNTERS:
            if metric.name in self.run_counters:
                counter = CounterMetricFamily(PREFIX + metric.name, metric.help, labels=catalogue.RUN_LABELS)
                counter.add_metric(run_labels, self.run_counters[metric.name])
                yield counter
        if self.phases:
            phases = catalogue.PHASE_SECONDS
            family = HistogramMetricFamily(PREFIX + phases.name, phases.help, labels=catalogue.PHASE_LABELS)
            for phase, histogram in self.phases.items():
                family.add_metric((*run_labels, phase), histogram.buckets(), histogram.sum)
            yield family
        if self.info:
            info = GaugeMetricFamily(
                PREFIX + catalogue.INFO.name, catalogue.INFO.help, labels=tuple(self.info)
            )
            info.add_metric(tuple(self.info.values()), 1.0)
            yield info

    def _add_evaluation_sets(self, gauge: GaugeMetricFamily) -> None:
        for name, loss in self.evaluation_sets.items():
            labels = dict(zip(catalogue.EVAL_SET_LABELS, (self.run, self.number, name), strict=True))
            gauge.add_sample(gauge.name, labels, loss)

    def _rank_series(self) -> Iterator[str]:
        for metric in _RANK_GAUGES:
            if metric.name in self.columns:
                yield header(PREFIX + metric.name, "gauge", metric.help)
                yield samples(PREFIX + metric.name, self.labels, self.columns[metric.name])
        for metric in catalogue.COUNTERS:
            if metric.name in self.rank_counters:
                name = f"{PREFIX}{metric.name}_total"
                yield header(name, "counter", metric.help)
                yield samples(name, self.labels, self.rank_counters[metric.name])


class Exporter:
    """Holds the metrics of a run and serves them over HTTP.

    Args:
        run: Name of the run.
        host: Address to listen on.
        port: Port; 0 uses any free port, auto the first free port of `AUTO_PORTS`.

    Attributes:
        target_problem: Why the target file of the endpoint could not be written; None on success.

    Raises:
        ClusterError: The port is in use or the address does not belong to this machine.
    """

    def __init__(self, run: str, host: str, port: int | Literal["auto"]) -> None:
        self._run, self._lock = run, Lock()
        self._attempt = _Attempt(run, "0")
        try:
            self._endpoint = Endpoint(host, port, self.text)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise endpoint_error(host, port, reason) from None
        self.target_problem: str | None = None
        self._target: TargetFile | None = None
        folder = targets.folder(os.environ)
        if folder is None:
            return
        try:
            self._target = TargetFile(folder, run, host, self.port)
        except OSError as error:
            self.target_problem = (
                f"{folder} cannot be written ({error.strerror}), so a local Prometheus does not discover "
                f"this run; set {targets.FOLDER_VARIABLE} to a writable folder, or to an empty string"
            )

    @property
    def port(self) -> int:
        """Port of the endpoint."""
        return self._endpoint.port

    def text(self) -> str:
        """Return all series in the Prometheus text format."""
        with self._lock:
            now = self._attempt
            copy = replace(now, values=dict(now.values), rank_counters=dict(now.rank_counters))
            copy.run_counters = dict(now.run_counters)
        return copy.text()

    def begin_attempt(self, attempt: int, ranks: Sequence[RankLabels], info: Mapping[str, object]) -> None:
        """Remove the series of the previous attempt and start a new one.

        Counters are exported as 0 before the first step, because Prometheus' `increase` ignores the first
        value of a new series.
        """
        number = str(attempt)
        labels = {name: str(info[name]) for name in catalogue.INFO_LABELS if name in info}
        labels |= {"run": self._run, "attempt": number}
        current = _Attempt(
            self._run,
            number,
            labels=tuple(
                format_labels(catalogue.RANK_LABELS, (self._run, number, rank.node, rank.rank, rank.gpu))
                for rank in ranks
            ),
            memory_limits=np.array(
                [np.nan if rank.memory_limit_bytes is None else rank.memory_limit_bytes for rank in ranks]
            ),
            info=labels,
            rank_counters={metric.name: np.zeros(len(ranks)) for metric in catalogue.COUNTERS},
            run_counters={metric.name: 0.0 for metric in catalogue.RUN_COUNTERS},
            phases={phase: Histogram(catalogue.PHASE_BOUNDS_SECONDS) for phase in catalogue.PHASES},
        )
        with self._lock:
            self._attempt = current

    def end_attempt(self) -> None:
        """Remove the series that are only valid while the workers of the attempt are alive.

        Counters keep their values until the next attempt, so that the next scrape still sees them.
        """
        with self._lock:
            self._attempt.columns = {}
            self._attempt.values = {
                name: value for name, value in self._attempt.values.items() if name in _LASTING
            }

    def set_run(self, values: Mapping[str, float]) -> None:
        """Set per-run series; other names in `values` are ignored."""
        with self._lock:
            self._attempt.values |= {name: value for name, value in values.items() if name in _RUN_NAMES}

    def set_evaluation_sets(self, losses: Mapping[str, float]) -> None:
        """Set the evaluation loss of each evaluation set; it lasts as the total loss does."""
        with self._lock:
            self._attempt.evaluation_sets = dict(losses)

    def set_ranks(self, columns: Mapping[str, FloatArray], flops: FloatArray, seconds: float) -> None:
        """Set the per-rank series of a step, and add its tokens, FLOPs and seconds to the counters.

        Args:
            columns: Array of shape (world_size,) by metric name. NaN and missing metrics are not exported, so
                that no value of an earlier step is current.
            flops: Model FLOPs of the step, shape (world_size,).
            seconds: Wall-clock seconds of the step.

        Raises:
            ValueError: The length of an array is not the world size.
        """
        current = self._attempt
        for name, column in {**columns, "processed_flops": flops}.items():
            if len(column) != len(current.labels):
                raise ValueError(f"{name} has {len(column)} values for {len(current.labels)} ranks")
        if current.memory_limits is not None:
            columns = {**columns, "memory_limit_bytes": current.memory_limits}
        counters = current.rank_counters
        with self._lock:
            current.columns = columns
            counters["processed_tokens"] = counters["processed_tokens"] + columns["tokens"]
            counters["processed_flops"] = counters["processed_flops"] + flops
            current.run_counters["processed_seconds"] += seconds

    def count(self, amounts: Mapping[str, float]) -> None:
        """Increment per-run counters."""
        with self._lock:
            for name, amount in amounts.items():
                self._attempt.run_counters[name] += amount

    def observe(self, phase: str, seconds: Sequence[float] | FloatArray) -> None:
        """Add observations to the histogram of a phase."""
        with self._lock:
            self._attempt.phases[phase].observe(seconds)

    def refresh_target(self) -> None:
        """Rewrite the target file of the endpoint if it was removed or is old."""
        if self._target is not None:
            with suppress(OSError):  # a full disk must not fail the run
                self._target.refresh()

    def close(self) -> None:
        """Stop serving."""
        if self._target is not None:
            with suppress(OSError):
                self._target.remove()
        self._endpoint.close()


def require_port(host: str, port: int | Literal["auto"] | None) -> None:
    """Check that the endpoint can be opened, before expensive work starts.

    Raises:
        ClusterError: The port is in use or the address does not belong to this machine.
    """
    if port is None:
        return
    try:
        with socket.socket(family_of(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, 0 if port == "auto" else port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise endpoint_error(host, port, reason) from None


def endpoint_error(host: str, port: int | Literal["auto"], reason: str | None) -> ClusterError:
    """Return the error for an endpoint that cannot be opened."""
    if port == "auto":
        return ClusterError(
            f"metrics.port=auto found no port from {AUTO_PORTS[0]} to {AUTO_PORTS[-1]} on {host} that can be "
            f"opened ({reason}); check metrics.host, or set metrics.port: 0 for any free port"
        )
    return ClusterError(
        f"metrics.port={port} on {host} cannot be opened ({reason}); free it, set another "
        "metrics.port, or 0 for any free port"
    )
