"""The Prometheus endpoint of a run: per-rank and per-run series, withdrawn when their attempt ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Literal

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.errors import ClusterError
from orchestrator.metrics import catalogue, targets
from orchestrator.metrics.catalogue import PREFIX
from orchestrator.metrics.endpoint import AUTO_PORTS, Endpoint, family_of
from orchestrator.metrics.exposition import Histogram, header, labelled, samples
from orchestrator.metrics.meter import FloatArray
from orchestrator.metrics.targets import Target

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
    """Who a worker is, as the labels `node`, `rank` and `gpu` say it, and the memory of its device."""

    node: str
    rank: str
    gpu: str
    memory_limit_bytes: float | None = None


@dataclass(eq=False)
class _Attempt(Collector):
    """What is shown of one attempt. Arrays are replaced, never changed: a scrape may be reading them."""

    run: str
    number: str
    labels: tuple[str, ...] = ()
    memory_limits: FloatArray | None = None
    info: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    columns: Mapping[str, FloatArray] = field(default_factory=dict)
    rank_counters: dict[str, FloatArray] = field(default_factory=dict)
    run_counters: dict[str, float] = field(default_factory=dict)
    phases: dict[str, Histogram] = field(default_factory=dict)

    def text(self) -> str:
        """Return all series as text: those of the run by the client library, those of ranks by ours."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode() + "".join(self._of_ranks())

    def collect(self) -> Iterator[Metric]:
        """Yield the series of the run; this makes an attempt a collector of the client library."""
        who = (self.run, self.number)
        for metric in _RUN_GAUGES:
            if metric.name in self.values:
                gauge = GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=catalogue.RUN_LABELS)
                gauge.add_metric(who, self.values[metric.name])
                yield gauge
        for metric in catalogue.RUN_COUNTERS:
            if metric.name in self.run_counters:
                counter = CounterMetricFamily(PREFIX + metric.name, metric.help, labels=catalogue.RUN_LABELS)
                counter.add_metric(who, self.run_counters[metric.name])
                yield counter
        if self.phases:
            phases = catalogue.PHASE_SECONDS
            family = HistogramMetricFamily(PREFIX + phases.name, phases.help, labels=catalogue.PHASE_LABELS)
            for phase, histogram in self.phases.items():
                family.add_metric((*who, phase), histogram.buckets(), histogram.sum)
            yield family
        if self.info:
            info = GaugeMetricFamily(
                PREFIX + catalogue.INFO.name, catalogue.INFO.help, labels=tuple(self.info)
            )
            info.add_metric(tuple(self.info.values()), 1.0)
            yield info

    def _of_ranks(self) -> Iterator[str]:
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
    """Holds the series and serves them over HTTP.

    Args:
        run: Name of the run.
        host: Address to listen on.
        port: Port; 0 takes any free one, auto the first free one of a range.

    Attributes:
        unlisted: Why this machine's list of targets does not name the endpoint; None where it does.

    Raises:
        ClusterError: The port is taken or the address is not this machine's.
    """

    def __init__(self, run: str, host: str, port: int | Literal["auto"]) -> None:
        self._run, self._lock = run, Lock()
        self._attempt = _Attempt(run, "0")
        try:
            self._endpoint = Endpoint(host, port, self.text)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no host name"
            raise endpoint_error(host, port, reason) from None
        self.unlisted: str | None = None
        self._target: Target | None = None
        place = targets.folder(os.environ)
        if place is None:
            return
        try:
            self._target = Target(place, run, host, self.port)
        except OSError as error:
            self.unlisted = (
                f"{place} cannot be written ({error.strerror}), so a Prometheus that reads it does not find "
                f"this run; set {targets.PLACE} to a folder of your own, or to nothing"
            )

    @property
    def port(self) -> int:
        """Port that is served."""
        return self._endpoint.port

    def text(self) -> str:
        """Return all series in Prometheus' text format."""
        with self._lock:
            now = self._attempt
            copy = replace(now, values=dict(now.values), rank_counters=dict(now.rank_counters))
            copy.run_counters = dict(now.run_counters)
        return copy.text()

    def begin_attempt(self, attempt: int, ranks: Sequence[RankLabels], info: Mapping[str, Any]) -> None:
        """Withdraw the series of the attempt before, and say what this one is.

        Counters stand at 0 before the first step, so that Prometheus counts that step too: of a series that
        appears with a value it takes this value for the past.
        """
        number = str(attempt)
        chosen = {name: str(info[name]) for name in catalogue.INFO_LABELS if name in info}
        chosen |= {"run": self._run, "attempt": number}
        shown = _Attempt(
            self._run,
            number,
            labels=tuple(
                labelled(catalogue.RANK_LABELS, (self._run, number, each.node, each.rank, each.gpu))
                for each in ranks
            ),
            memory_limits=np.array(
                [np.nan if each.memory_limit_bytes is None else each.memory_limit_bytes for each in ranks]
            ),
            info=chosen,
            rank_counters={metric.name: np.zeros(len(ranks)) for metric in catalogue.COUNTERS},
            run_counters={metric.name: 0.0 for metric in catalogue.RUN_COUNTERS},
            phases={phase: Histogram(catalogue.PHASE_BOUNDS_SECONDS) for phase in catalogue.PHASES},
        )
        with self._lock:
            self._attempt = shown

    def end_attempt(self) -> None:
        """Withdraw what was true only while the workers of the attempt lived.

        Counters stay, and stand still, until the next attempt begins: a scrape may not have seen them yet.
        """
        with self._lock:
            self._attempt.columns = {}
            self._attempt.values = {
                name: value for name, value in self._attempt.values.items() if name in _LASTING
            }

    def set_run(self, values: Mapping[str, float]) -> None:
        """Set series that stand for the whole run; others in `values` are passed over."""
        with self._lock:
            self._attempt.values |= {name: value for name, value in values.items() if name in _RUN_NAMES}

    def set_ranks(self, columns: Mapping[str, FloatArray], flops: FloatArray, seconds: float) -> None:
        """Set the series of all ranks, and count their tokens and FLOPs with the seconds that they took.

        Args:
            columns: Values by name and rank. What is NaN, or is not among them, is not shown: what is not
                known of this step must not look as if it were.
            flops: FLOPs of each rank's step.
            seconds: Wall seconds of the step.

        Raises:
            ValueError: There are not as many values as ranks.
        """
        shown = self._attempt
        for name, column in {**columns, "processed_flops": flops}.items():
            if len(column) != len(shown.labels):
                raise ValueError(f"{name} has {len(column)} values for {len(shown.labels)} ranks")
        if shown.memory_limits is not None:
            columns = {**columns, "memory_limit_bytes": shown.memory_limits}
        counted = shown.rank_counters
        with self._lock:
            shown.columns = columns
            counted["processed_tokens"] = counted["processed_tokens"] + columns["tokens"]
            counted["processed_flops"] = counted["processed_flops"] + flops
            shown.run_counters["processed_seconds"] += seconds

    def count(self, amounts: Mapping[str, float]) -> None:
        """Add to counters of the whole run."""
        with self._lock:
            for name, amount in amounts.items():
                self._attempt.run_counters[name] += amount

    def observe(self, phase: str, seconds: Sequence[float] | FloatArray) -> None:
        """Add observations to the histogram of a phase."""
        with self._lock:
            self._attempt.phases[phase].observe(seconds)

    def keep_listed(self) -> None:
        """See to it that this machine's list of targets still names the endpoint."""
        if self._target is not None:
            with suppress(OSError):  # a full disk is no reason to end a run
                self._target.keep()

    def close(self) -> None:
        """Stop serving."""
        if self._target is not None:
            with suppress(OSError):
                self._target.remove()
        self._endpoint.close()


def require_port(host: str, port: int | Literal["auto"] | None) -> None:
    """Find out that an endpoint cannot be opened, before anything is paid for.

    Raises:
        ClusterError: The port is taken or the address is not this machine's.
    """
    if port is None:
        return
    try:
        with socket.socket(family_of(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, 0 if port == "auto" else port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no host name"
        raise endpoint_error(host, port, reason) from None


def endpoint_error(host: str, port: int | Literal["auto"], reason: str | None) -> ClusterError:
    """Return the error that says why the endpoint cannot be opened."""
    if port == "auto":
        return ClusterError(
            f"metrics.port=auto finds none of {AUTO_PORTS[0]} to {AUTO_PORTS[-1]} on {host} that can be "
            f"opened ({reason}); check metrics.host, or set metrics.port: 0 for any free port"
        )
    return ClusterError(
        f"metrics.port={port} on {host} cannot be opened ({reason}); free it, set another "
        "metrics.port, or 0 for any free one"
    )
