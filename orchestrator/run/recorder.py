"""The memory of a run on the driver's side: steps.jsonl, workers.json, the metrics endpoint, and the fence.

One recorder lives beside the driver. Rank 0 sends it one message a step, which already holds what every
rank did. It knows which attempt is the current one and refuses messages of earlier ones, so an attempt that
was believed dead cannot write.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.atomic_files import read_lines, write_json, write_whole
from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.metrics.exporter import Exporter, RankLabels
from orchestrator.metrics.meter import PHASES, RankSteps, eta_seconds, peaks, rank_columns, step_values
from orchestrator.metrics.targets import address
from orchestrator.metrics.trackers import Trackers, no_trackers
from orchestrator.run.failures import Failure, deterministic_failure_error, is_deterministic
from orchestrator.run.run_lock import RunLock

METRICS = "metrics.json"  # where the endpoint is, while there is one
STEPS, WORKERS, ATTEMPTS, EVALUATIONS = "steps.jsonl", "workers.json", "attempts.jsonl", "evaluations.jsonl"
REPORT = "report.json"


@dataclass(frozen=True)
class WorkerInfo:
    """One worker of an attempt, as workers.json lists it."""

    rank: int
    node: str
    hostname: str
    pid: int
    device: str
    gpu: str
    peak_flops: float | None
    attempt: int = 0
    memory_limit_bytes: int | None = None


@dataclass
class Status:
    """Where the run stands, for the driver to show.

    `start` is the step that the attempt began from, and `is_running` whether it has workers.
    """

    attempt: int = 0
    start: int = 0
    step: int = 0
    steps: int = 0
    eta_seconds: float = 0.0
    metrics_port: int | None = None
    latest: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fatal: OrchestratorError | None = None
    is_running: bool = False


class Recorder:
    """Writes the run's files and serves its metrics.

    Args:
        folder: The run's folder.
        run: Name of the run.
        run_lock: The lock of the driver, refreshed whenever the driver asks for the status.
        host: Address of the endpoint.
        port: Port of the endpoint, or auto; None opens none.
        trackers: Makes what else draws the numbers, given where to complain.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        run_lock: RunLock,
        host: str,
        port: int | Literal["auto"] | None,
        trackers: Callable[[Callable[[str], None]], Trackers] = no_trackers,
    ) -> None:
        self._folder, self._run_lock = folder, run_lock
        self._exporter = Exporter(run, host, port) if port is not None else None
        self._status = Status(metrics_port=self._exporter.port if self._exporter else None)
        self._notes: deque[str] = deque()  # trackers add to it from their thread
        self._say_where(host)
        self._trackers = trackers(self._notes.append)
        self._workers: list[WorkerInfo] = []
        self._checkpoint_seconds = 0.0
        self._recent: deque[float] = deque(maxlen=20)
        self._recent_tokens: deque[float] = deque(maxlen=20)
        self._checkpoint_time: float | None = None
        self._step_time = 0.0
        self._failures: list[Failure] = []
        self._stop_requested = False
        rows = read_lines(folder / STEPS)
        self._last_written = (int(rows[-1]["attempt"]), int(rows[-1]["step"])) if rows else (0, 0)
        self._past = read_lines(folder / ATTEMPTS)
        self._status.attempt = len(self._past)
        if self._past:  # a later start of the run, or this recorder was started anew in the middle of it
            self._status.step, self._status.steps = self._last_written[1], self._past[-1]["steps_planned"]
            self._status.start = self._status.step
            self._workers = [
                WorkerInfo(**entry) for entry in json.loads((folder / WORKERS).read_text("utf-8"))
            ]
            self._announce()

    def begin_attempt(
        self, workers: Sequence[WorkerInfo], info: Mapping[str, Any], start: int, steps: int
    ) -> int:
        """Begin an attempt and fence off those before it.

        Args:
            workers: Every worker, by rank.
            info: Effective degrees, number format and device kind.
            start: Steps that are done, from the checkpoint it resumes from.
            steps: Steps of the whole run.

        Returns:
            Number of the attempt, from 1.

        Raises:
            OrchestratorError: The run has failed for good; starting again would fail in the same way.
        """
        if self._status.fatal is not None:
            raise self._status.fatal
        attempt = len(self._past) + 1
        lost = max(0, self._last_written[1] - start) if self._past else 0
        entry = {
            "attempt": attempt,
            "time": time.time(),
            "start_step": start,
            "steps_lost": lost,
            "steps_planned": steps,
            "world_size": len(workers),
            "nodes": sorted({worker.node for worker in workers}),
            "metrics_port": self._status.metrics_port,
            **info,
        }
        self._workers = [WorkerInfo(**{**asdict(worker), "attempt": attempt}) for worker in workers]
        write_json(self._folder / WORKERS, [asdict(worker) for worker in self._workers])
        self._past.append(entry)
        _append(self._folder / ATTEMPTS, entry)
        self._status.attempt, self._status.start = attempt, start
        self._status.step, self._status.steps = start, steps
        self._status.is_running = True
        self._recent.clear()
        self._recent_tokens.clear()
        self._announce()
        return attempt

    def record_step(self, attempt: int, values: Mapping[str, float], ranks: RankSteps) -> None:
        """Record a finished step.

        Args:
            attempt: Whose step it is; one that is not current is refused.
            values: step, epoch, seconds, learning_rate, gradient_norm, skipped.
            ranks: What every rank did.
        """
        self._require_current(attempt)
        step = int(values["step"])
        if (attempt, step) <= self._last_written:
            return  # the same message again, after the recorder was started anew
        peak_flops = peaks(worker.peak_flops for worker in self._workers)
        seconds = values["seconds"]
        row = {
            **{name: values[name] for name in ("step", "epoch", "learning_rate", "gradient_norm", "skipped")},
            **step_values(ranks, seconds, peak_flops),
            "attempt": attempt,
            "time": time.time(),
        }
        _append(self._folder / STEPS, row)
        self._last_written, self._step_time = (attempt, step), row["time"]
        self._status.is_running = True  # also for a recorder that was started anew
        self._recent.append(seconds)
        self._recent_tokens.append(row["tokens"])
        self._status.step, self._status.latest = step, row
        self._status.eta_seconds = eta_seconds(step, self._status.steps, self._recent)
        self._trackers.log(step, {name: value for name, value in row.items() if name != "step"})
        if self._exporter:
            columns = rank_columns(ranks, seconds, peak_flops)
            self._exporter.set_ranks(columns, ranks.column("flops_model"), seconds)
            for name in PHASES:
                self._exporter.observe(name.removesuffix("_seconds"), ranks.column(name))
            self._exporter.count({"skipped_steps": float(values["skipped"])})
            self._exporter.set_run({**row, "last_step_timestamp_seconds": row["time"], **self._to_go()})

    def record_evaluation(self, attempt: int, step: int, loss: float) -> None:
        """Record a loss on held-out rows; the message comes right after that of the step, or after this."""
        self._require_current(attempt)
        _append(self._folder / EVALUATIONS, {"step": step, "evaluation_loss": loss, "attempt": attempt})
        self._note(f"step {step}: evaluation loss {loss:.4f}")
        self._trackers.log(step, {"evaluation_loss": loss})
        if self._exporter:
            self._exporter.set_run({"evaluation_loss": loss})
            if self._step_time:
                seconds = time.time() - self._step_time
                self._exporter.set_run({"evaluation_seconds": seconds})
                self._exporter.observe("evaluation", [seconds])

    def record_checkpoint(self, attempt: int, step: int, seconds: float) -> None:
        """Record a published checkpoint."""
        self._require_current(attempt)
        self._checkpoint_seconds += seconds
        self._checkpoint_time = time.time()
        self._note(f"step {step}: checkpoint saved in {seconds:.1f} s")
        if self._exporter:
            self._exporter.set_run(
                {"checkpoint_seconds": seconds, "last_checkpoint_timestamp_seconds": self._checkpoint_time}
            )
            self._exporter.observe("checkpoint", [seconds])

    def end_attempt(self) -> None:
        """Withdraw what the workers of the current attempt have shown: they are no more."""
        self._status.is_running = False
        if self._exporter:
            self._exporter.end_attempt()

    def authorize_publish(self, attempt: int) -> None:
        """Allow an attempt to publish a checkpoint.

        Raises:
            TrainingError: A newer attempt, or another driver, has taken the run over.
        """
        self._require_current(attempt)
        if not self._run_lock.is_held(self._folder):
            raise TrainingError(
                f"another driver has taken over the run in {self._folder}; this one stops writing"
            )

    def report_fatal(self, error: OrchestratorError, attempt: int | None) -> None:
        """Note an error that starting again cannot mend; of an attempt that was replaced it means nothing."""
        if self._status.fatal is None and attempt in (None, self._status.attempt):
            self._status.fatal = error
            self.end_attempt()

    def report_failure(self, failure: Failure) -> None:
        """Note what a rank raised; where the try before ended in the same way, the run ends."""
        self._failures.append(failure)
        if is_deterministic(self._failures):
            self.report_fatal(deterministic_failure_error(failure), None)

    def failures(self) -> list[Failure]:
        """Return what ranks have raised since the driver started, in order."""
        return self._failures

    def next_attempt(self) -> int:
        """Return the number of the attempt that is about to begin."""
        return len(self._past) + 1

    def request_stop(self) -> bool:
        """Have the workers save and end after the step that they are at; tell whether there are any."""
        self._stop_requested = True
        return self._status.is_running

    def stop_requested(self) -> bool:
        """Tell a worker whether it is to end."""
        return self._stop_requested

    def finish_training(self, attempt: int) -> None:
        """Note that the workers have done and saved what they were to do."""
        if attempt == self._status.attempt:
            self._status.is_running = False

    def end_run(self, how: Literal["stopped", "finished"]) -> None:
        """Note in attempts.jsonl that the current attempt ended without a failure."""
        self.end_attempt()
        self._past[-1] |= {"ended": how, "end_step": self._status.step}
        write_whole(self._folder / ATTEMPTS, "".join(json.dumps(entry) + "\n" for entry in self._past))

    def status(self) -> Status:
        """Return where the run stands, and refresh the run lock."""
        if self._run_lock.is_held(self._folder):
            self._run_lock.refresh(self._folder)
        if self._exporter:
            self._exporter.keep_listed()
        notes = tuple(self._notes.popleft() for _ in range(len(self._notes)))
        return Status(**{**vars(self._status), "notes": notes})

    def checkpoint_seconds(self) -> float:
        """Return the seconds that checkpoints took since the driver started."""
        return self._checkpoint_seconds

    def close(self) -> None:
        """Stop serving metrics, and write what trackers have not."""
        self._trackers.close()
        if self._exporter:
            self._exporter.close()
            (self._folder / METRICS).unlink(missing_ok=True)

    def _say_where(self, host: str) -> None:
        """Write down where the endpoint is, for scripts to find it; what a killed run left is removed."""
        (self._folder / METRICS).unlink(missing_ok=True)
        if self._exporter is None:
            return
        where = {"target": address(host, self._exporter.port), "host": host, "port": self._exporter.port}
        write_json(self._folder / METRICS, {**where, "hostname": os.uname().nodename, "pid": os.getpid()})
        if self._exporter.unlisted:
            self._note(self._exporter.unlisted)

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _announce(self) -> None:
        """Show the current attempt, and withdraw what the one before has shown."""
        if self._exporter is None:
            return
        labels = [
            RankLabels(worker.node, str(worker.rank), worker.gpu, worker.memory_limit_bytes)
            for worker in self._workers
        ]
        entry = self._past[-1]
        self._exporter.begin_attempt(self._status.attempt, labels, entry)
        totals = {
            "step": self._status.step,
            "steps_planned": self._status.steps,
            "steps_to_go": self._status.steps - self._status.step,
            "restarts": restarts(self._past),
            "steps_lost": sum(past["steps_lost"] for past in self._past),
            "world_size": len(self._workers),
            "attempt_start_timestamp_seconds": time.time(),
            "checkpoint_every_steps": entry.get("checkpoint_every_steps"),
            "last_checkpoint_timestamp_seconds": self._checkpoint_time,
        }
        self._exporter.set_run({name: value for name, value in totals.items() if value is not None})

    def _to_go(self) -> dict[str, float]:
        steps = self._status.steps - self._status.step
        return {
            "steps_to_go": steps,
            "tokens_to_go": steps * sum(self._recent_tokens) / len(self._recent_tokens),
            "seconds_to_go": self._status.eta_seconds,
        }

    def _require_current(self, attempt: int) -> None:
        if attempt != self._status.attempt:
            raise TrainingError(
                f"attempt {attempt} has been replaced by attempt {self._status.attempt}; it may not "
                "write any more"
            )


def restarts(attempts: Sequence[Mapping[str, Any]]) -> int:
    """Return how many attempts had to follow one that failed, from the entries of attempts.jsonl."""
    return sum("ended" not in entry for entry in attempts[:-1])


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
