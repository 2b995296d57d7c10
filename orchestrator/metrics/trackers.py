"""Logs metrics to TensorBoard, Weights & Biases and MLflow.

The recorder is the only writer. Trackers are called in a background thread, because they write to disks and
networks: a slow tracker does not delay training, and one that fails is disabled for the rest of the run.
Steps repeated after a restart are logged again with the same step number. docs/adr/0013 explains why
`accelerate.tracking` is not used.
"""

from __future__ import annotations

import importlib.util
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import SpecError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_ID_FILES = {"wandb": "wandb_id", "mlflow": "mlflow_id"}  # in the run directory, to resume the tracker's run
_MAX_QUEUED = 10_000
_SECONDS_TO_DRAIN = 30.0


class Tracker(Protocol):
    """Backend that stores metrics by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def close(self) -> None:
        """Flush and close."""


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return a problem for each tracker whose package is not installed."""
    return [
        f"metrics.trackers contains {name}, but the package {PACKAGES[name]} is not installed; install the "
        "extra `trackers`, or remove it"
        for name in names
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]


def require_packages(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        SpecError: With every missing package.
    """
    missing = missing_packages(names)
    if missing:
        raise SpecError(*missing)


class Trackers:
    """The trackers of a run, called in a background thread.

    Args:
        names: Names of the trackers.
        run: Name of the run.
        project: Project (Weights & Biases) or experiment (MLflow).
        run_dir: Run directory.
        job: The job, logged as configuration.
        note: Called with a message when a tracker fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: str,
        project: str,
        run_dir: Path,
        job: Mapping[str, object],
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._factories = {name: partial(_FACTORIES[name], run, project, run_dir, job) for name in names}
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MAX_QUEUED)
        self._overflowed = False
        self._thread = threading.Thread(target=self._write, name="trackers", daemon=True)
        if names:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Queue the metrics of a step; values that are not finite numbers are dropped."""
        if not self._factories:
            return
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            if not self._overflowed:
                self._note(f"trackers are {_MAX_QUEUED} steps behind; further steps are not logged to them")
            self._overflowed = True

    def close(self) -> None:
        """Write the queued steps, for at most half a minute."""
        if not self._factories:
            return
        try:
            self._queue.put(None, timeout=_SECONDS_TO_DRAIN)
        except queue.Full:
            return
        self._thread.join(_SECONDS_TO_DRAIN)

    def _write(self) -> None:
        active: dict[str, Tracker] = {}
        for name, create in self._factories.items():
            with self._disable_on_error(name, active):
                active[name] = create()
        while (item := self._queue.get()) is not None:
            for name, tracker in list(active.items()):
                with self._disable_on_error(name, active):
                    tracker.log(*item)
        for name, tracker in list(active.items()):
            with self._disable_on_error(name, active):
                tracker.close()

    @contextmanager
    def _disable_on_error(self, name: str, active: dict[str, Tracker]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a tracker may fail the run
            active.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            self._note(f"tracker {name} is disabled: {type(error).__name__}: {reason}")


def no_trackers(note: Callable[[str], None]) -> Trackers:
    """Return `Trackers` without any tracker."""
    return Trackers((), "", "", Path(), {}, note)


class _TensorBoard:
    def __init__(self, run: str, project: str, run_dir: Path, job: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: str, project: str, run_dir: Path, job: Mapping[str, object]) -> None:
        import wandb

        run_id = _read_id(run_dir, "wandb")
        self._run: Any = wandb.init(
            project=project, name=run, id=run_id, resume="allow", dir=str(run_dir), config=dict(job)
        )
        _write_id(run_dir, "wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: str, project: str, run_dir: Path, job: Mapping[str, object]) -> None:
        from mlflow.tracking import MlflowClient

        uri = None if "MLFLOW_TRACKING_URI" in os.environ else (run_dir / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._id = _read_id(run_dir, "mlflow")
        if self._id is None:
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = (
                experiment.experiment_id if experiment else self._client.create_experiment(project)
            )
            self._id = self._client.create_run(experiment_id, run_name=run).info.run_id
            _write_id(run_dir, "mlflow", self._id)
            for name, value in _flatten(job):
                self._client.log_param(self._id, name, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        timestamp_ms = int(values["time"] * 1000) if "time" in values else 0
        metrics = [Metric(name, value, timestamp_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_FACTORIES: Mapping[str, Callable[[str, str, Path, Mapping[str, object]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _read_id(run_dir: Path, name: str) -> str | None:
    file = run_dir / _ID_FILES[name]
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _write_id(run_dir: Path, name: str, run_id: str) -> None:
    (run_dir / _ID_FILES[name]).write_text(run_id + "\n", encoding="utf-8")


def _flatten(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return nested mappings as pairs of dotted name and value."""
    pairs: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
