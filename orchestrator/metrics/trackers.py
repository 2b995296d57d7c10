"""TensorBoard, Weights & Biases and MLflow: the same numbers under the same names, from one writer.

The recorder is that writer. Trackers write over networks and disks of their own, so they have a thread of
their own: a slow one holds up nobody, and one that fails is left out for the rest of the run, which it does
not end. Steps that are done again after a restart are logged again, with the same numbers.
"""

from __future__ import annotations

import importlib.util
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import SpecError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_IDENTITIES = {"wandb": "wandb_id", "mlflow": "mlflow_id"}  # files: a run that goes on goes on there as well
_MOST_WAITING = 10_000
_SECONDS_TO_DRAIN = 30.0


class Tracker(Protocol):
    """Something that draws numbers over steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return a sentence for each tracker whose package is not installed."""
    return [
        f"metrics.trackers has {name}, and the package {PACKAGES[name]} is not installed; install the extra "
        "`trackers`, or leave it out"
        for name in names
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]


def require_packages(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        SpecError: With each of them.
    """
    missing = missing_packages(names)
    if missing:
        raise SpecError(*missing)


class Trackers:
    """Trackers of a run, written to from a thread of their own.

    Args:
        names: Which.
        run: Name of the run.
        project: Project (Weights & Biases) or experiment (MLflow).
        folder: The run's folder.
        job: The job, shown beside the curves.
        note: Told when one fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: str,
        project: str,
        folder: Path,
        job: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._begin = [(name, _STARTS[name], (run, project, folder, job)) for name in names]
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MOST_WAITING)
        self._full = False
        self._thread = threading.Thread(target=self._write, name="trackers", daemon=True)
        if names:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand over the numbers of a step; what is no number is left out."""
        if not self._begin:
            return
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        try:
            self._waiting.put_nowait((step, numbers))
        except queue.Full:
            if not self._full:
                self._note(f"trackers are {_MOST_WAITING} steps behind; what comes now is left out there")
            self._full = True

    def close(self) -> None:
        """Write what is waiting, for half a minute at most."""
        if not self._begin:
            return
        try:
            self._waiting.put(None, timeout=_SECONDS_TO_DRAIN)
        except queue.Full:
            return
        self._thread.join(_SECONDS_TO_DRAIN)

    def _write(self) -> None:
        open_ones: dict[str, Tracker] = {}
        for name, start, arguments in self._begin:
            self._try(name, open_ones, partial(self._open, name, open_ones, start, arguments))
        while (item := self._waiting.get()) is not None:
            for name, tracker in list(open_ones.items()):
                self._try(name, open_ones, partial(tracker.log, *item))
        for name, tracker in list(open_ones.items()):
            self._try(name, open_ones, tracker.close)

    @staticmethod
    def _open(
        name: str, open_ones: dict[str, Tracker], start: Callable[..., Tracker], arguments: tuple[Any, ...]
    ) -> None:
        open_ones[name] = start(*arguments)

    def _try(self, name: str, open_ones: dict[str, Tracker], action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the run goes on without
            open_ones.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            self._note(f"{name} is left out from here on: {type(error).__name__}: {reason}")


def no_trackers(note: Callable[[str], None]) -> Trackers:
    """Return trackers that write nowhere."""
    return Trackers((), "", "", Path(), {}, note)


class _TensorBoard:
    def __init__(self, run: str, project: str, folder: Path, job: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: str, project: str, folder: Path, job: Mapping[str, Any]) -> None:
        import wandb

        known = _identity(folder, "wandb")
        self._run: Any = wandb.init(
            project=project, name=run, id=known, resume="allow", dir=str(folder), config=dict(job)
        )
        _remember(folder, "wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: str, project: str, folder: Path, job: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        where = None if "MLFLOW_TRACKING_URI" in os.environ else (folder / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=where)
        self._id = _identity(folder, "mlflow")
        if self._id is None:
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            self._id = self._client.create_run(number, run_name=run).info.run_id
            _remember(folder, "mlflow", self._id)
            for name, value in _flat(job):
                self._client.log_param(self._id, name, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(values["time"] * 1000) if "time" in values else 0
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_STARTS: Mapping[str, Callable[[str, str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _identity(folder: Path, name: str) -> str | None:
    file = folder / _IDENTITIES[name]
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _remember(folder: Path, name: str, identity: str) -> None:
    (folder / _IDENTITIES[name]).write_text(identity + "\n", encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
