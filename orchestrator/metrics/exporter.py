"""The Prometheus endpoint of a run: per-rank and per-run series, withdrawn when their attempt ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from orchestrator.errors import ClusterError
from orchestrator.metrics import catalogue


@dataclass(frozen=True)
class RankLabels:
    """Who a worker is, as the labels `node`, `rank` and `gpu` say it."""

    node: str
    rank: str
    gpu: str


class Exporter:
    """Holds the series and serves them over HTTP.

    Args:
        run: Name of the run.
        host: Address to listen on.
        port: Port; 0 takes a free one.

    Raises:
        ClusterError: The port is taken or the address is not this machine's.
    """

    def __init__(self, run: str, host: str, port: int) -> None:
        self._run = run
        self._registry = CollectorRegistry(auto_describe=True)
        self._ranks: tuple[RankLabels, ...] = ()
        self._attempt = "0"
        scopes = {"rank": catalogue.RANK_LABELS, "run": catalogue.RUN_LABELS}
        self._gauges = {
            metric.name: Gauge(
                catalogue.PREFIX + metric.name, metric.help, scopes[metric.scope], registry=self._registry
            )
            for metric in (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS)
        }
        self._scope = {m.name: m.scope for m in (*catalogue.STEP_METRICS, *catalogue.RUN_METRICS)}
        self._counters = {
            metric.name: Counter(
                catalogue.PREFIX + metric.name, metric.help, catalogue.RANK_LABELS, registry=self._registry
            )
            for metric in catalogue.COUNTERS
        }
        self._info = Gauge(
            catalogue.PREFIX + catalogue.INFO.name,
            catalogue.INFO.help,
            catalogue.INFO_LABELS,
            registry=self._registry,
        )
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no host name"
            raise endpoint_error(host, port, reason) from None

    @property
    def port(self) -> int:
        """Port that is served."""
        return int(self._server.server_port)

    def begin_attempt(self, attempt: int, ranks: Sequence[RankLabels], info: Mapping[str, Any]) -> None:
        """Withdraw the series of the attempt before, and say what this one is."""
        for metric in (*self._gauges.values(), *self._counters.values(), self._info):
            metric.clear()
        self._attempt, self._ranks = str(attempt), tuple(ranks)
        chosen = {name: str(info[name]) for name in catalogue.INFO_LABELS if name in info}
        self._info.labels(**{**chosen, "run": self._run, "attempt": self._attempt}).set(1)

    def set_run(self, values: Mapping[str, float]) -> None:
        """Set series that stand for the whole run; others in `values` are passed over."""
        for name, value in values.items():
            if self._scope.get(name) == "run":
                self._gauges[name].labels(self._run, self._attempt).set(value)

    def set_ranks(self, rows: Sequence[Mapping[str, float]], flops: Sequence[float]) -> None:
        """Set each rank's series from its row and count its tokens and FLOPs."""
        for labels, row, done in zip(self._ranks, rows, flops, strict=True):
            who = (self._run, self._attempt, labels.node, labels.rank, labels.gpu)
            for name, gauge in self._gauges.items():
                if self._scope[name] != "rank":
                    continue
                if name in row:
                    gauge.labels(*who).set(row[name])
                else:  # what is not known of this step must not look as if it were
                    gauge.remove_by_labels(dict(zip(catalogue.RANK_LABELS, who, strict=True)))
            self._counters["processed_tokens"].labels(*who).inc(row["tokens"])
            self._counters["processed_flops"].labels(*who).inc(done)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def endpoint_error(host: str, port: int, reason: str | None) -> ClusterError:
    """Return the error that says why the endpoint cannot be opened."""
    return ClusterError(
        f"metrics.port={port} on {host} cannot be opened ({reason}); free it, set another "
        "metrics.port, or 0 for any free one"
    )
