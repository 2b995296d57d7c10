"""The recorder of a run: steps.jsonl, workers.json, attempts.jsonl, the metrics endpoint, and fencing.

One recorder runs as a Ray actor on the driver's node. Rank 0 sends it one message per step with the metrics
of every rank. It rejects messages from all but the current attempt (fencing), so workers of a superseded
attempt cannot write.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.atomic_files import read_lines, write_json, write_text
from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.metrics.exporter import Exporter, RankLabels
from orchestrator.metrics.meter import PHASES, RankSteps, eta_seconds, peaks, rank_columns, step_values
from orchestrator.metrics.targets import address
from orchestrator.metrics.trackers import Trackers, no_trackers
from orchestrator.run.failures import Failure, deterministic_failure_error, is_deterministic
from orchestrator.run.run_lock import RunLock

METRICS = "metrics.json"  # address of the Prometheus endpoint while it is open
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
    """Progress of the run, as the driver displays it.

    Attributes:
        attempt: Number of the current attempt, from 1; 0 before the first.
        start: Step of the checkpoint that the attempt resumed from; 0 without one.
        step: Last finished step.
        steps: Steps of the whole run.
        eta_seconds: Estimated time to the last step.
        metrics_port: Port of the Prometheus endpoint; None without one.
        latest: The last row of steps.jsonl.
        notes: Messages since the last call, such as evaluation losses.
        fatal: A failure that a retry cannot fix.
        is_running: Whether the attempt has workers.
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
        folder: The run directory.
        run: Name of the run.
        run_lock: The lock of the driver, refreshed whenever the driver asks for the status.
        host: Address of the endpoint.
        port: Port of the endpoint, or auto; None opens none.
        trackers: Factory of the experiment trackers; its argument receives their warnings.
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
        if self._past:  # the run is resumed, or Ray restarted this actor
            self._status.step, self._status.steps = self._last_written[1], self._past[-1]["steps_planned"]
            self._status.start = self._status.step
            self._workers = [
                WorkerInfo(**entry) for entry in json.loads((folder / WORKERS).read_text("utf-8"))
            ]
            self._announce()

    def begin_attempt(
        self,
        workers: Sequence[WorkerInfo],
        info: Mapping[str, object],
        start: int,
        steps: int,
        notes: Sequence[str] = (),
    ) -> int:
        """Start an attempt; messages of earlier attempts are rejected afterwards.

        Args:
            workers: Every worker, by rank.
            info: Parallelism, dtype and device type, for attempts.jsonl.
            start: Step of the checkpoint that it resumes from.
            steps: Steps of the whole run.
            notes: Messages for the driver.

        Returns:
            Number of the attempt, from 1.

        Raises:
            OrchestratorError: The run has failed, and a retry cannot fix it.
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
        self._notes.extend(notes)
        self._announce()
        return attempt

    def record_step(self, attempt: int, values: Mapping[str, float], ranks: RankSteps) -> None:
        """Record a finished step.

        Args:
            attempt: The sender's attempt.
            values: step, epoch, seconds, learning_rate, gradient_norm, skipped.
            ranks: Metrics of every rank.

        Raises:
            TrainingError: The attempt is not the current one.
        """
        self._require_current(attempt)
        step = int(values["step"])
        if (attempt, step) <= self._last_written:
            return  # a retried message, after Ray restarted this actor
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
        self._status.is_running = True  # also after Ray restarted this actor
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

    def record_evaluation(self, attempt: int, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        """Record the evaluation loss of the last finished step over all sets, and of each set by name."""
        self._require_current(attempt)
        row = {"step": step, "evaluation_loss": loss, "evaluation_losses": dict(by_set), "attempt": attempt}
        _append(self._folder / EVALUATIONS, row)
        sets = by_set if len(by_set) > 1 else {}  # the loss of a single set is the total
        parts = ", ".join(f"{name} {part:.4f}" for name, part in sets.items())
        self._note(f"step {step}: evaluation loss {loss:.4f}" + (f" ({parts})" if parts else ""))
        tracked = {f"evaluation_loss/{name}": part for name, part in sets.items()}
        self._trackers.log(step, {"evaluation_loss": loss, **tracked})
        if self._exporter:
            self._exporter.set_run({"evaluation_loss": loss})
            self._exporter.set_evaluation_sets(sets)
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
        """Remove the metrics of the current attempt, whose workers have ended."""
        self._status.is_running = False
        if self._exporter:
            self._exporter.end_attempt()

    def authorize_publish(self, attempt: int) -> None:
        """Authorize the current attempt to publish a checkpoint.

        Raises:
            TrainingError: A newer attempt or another driver has taken over the run.
        """
        self._require_current(attempt)
        if not self._run_lock.is_held(self._folder):
            raise TrainingError(
                f"another driver has taken over the run in {self._folder}; this one stops writing"
            )

    def report_fatal(self, error: OrchestratorError, attempt: int | None) -> None:
        """Record a non-retryable error; ignored if the attempt has been superseded."""
        if self._status.fatal is None and attempt in (None, self._status.attempt):
            self._status.fatal = error
            self.end_attempt()

    def report_failure(self, failure: Failure) -> None:
        """Record an exception of a rank; the run fails if the previous attempt failed in the same way."""
        self._failures.append(failure)
        if is_deterministic(self._failures):
            self.report_fatal(deterministic_failure_error(failure), None)

    def failures(self) -> list[Failure]:
        """Return the exceptions of ranks since the driver started, in order."""
        return self._failures

    def next_attempt(self) -> int:
        """Return the number that the next attempt will have."""
        return len(self._past) + 1

    def request_stop(self) -> bool:
        """Ask the workers to save and end after the current step; return whether there are workers."""
        self._stop_requested = True
        return self._status.is_running

    def stop_requested(self) -> bool:
        """Return whether workers should save and end."""
        return self._stop_requested

    def finish_training(self, attempt: int) -> None:
        """Record that the workers of an attempt have trained and saved all steps."""
        if attempt == self._status.attempt:
            self._status.is_running = False

    def end_run(self, how: Literal["stopped", "finished"]) -> None:
        """Record in attempts.jsonl that the current attempt ended without a failure."""
        self.end_attempt()
        self._past[-1] |= {"ended": how, "end_step": self._status.step}
        write_text(self._folder / ATTEMPTS, "".join(json.dumps(entry) + "\n" for entry in self._past))

    def status(self) -> Status:
        """Return the progress of the run with messages since the last call, and refresh the run lock."""
        if self._run_lock.is_held(self._folder):
            self._run_lock.refresh(self._folder)
        if self._exporter:
            self._exporter.refresh_target()
        notes = tuple(self._notes.popleft() for _ in range(len(self._notes)))
        return Status(**{**vars(self._status), "notes": notes})

    def checkpoint_seconds(self) -> float:
        """Return the total time of checkpoints since the driver started, in seconds."""
        return self._checkpoint_seconds

    def close(self) -> None:
        """Flush the trackers and stop the metrics endpoint."""
        self._trackers.close()
        if self._exporter:
            self._exporter.close()
            (self._folder / METRICS).unlink(missing_ok=True)

    def _say_where(self, host: str) -> None:
        """Write metrics.json with the address of the endpoint, replacing one that a killed run left."""
        (self._folder / METRICS).unlink(missing_ok=True)
        if self._exporter is None:
            return
        where = {"target": address(host, self._exporter.port), "host": host, "port": self._exporter.port}
        write_json(self._folder / METRICS, {**where, "hostname": os.uname().nodename, "pid": os.getpid()})
        if self._exporter.target_problem:
            self._note(self._exporter.target_problem)

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _announce(self) -> None:
        """Export the metrics of the current attempt and remove those of the previous one."""
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
                f"attempt {attempt} has been superseded by attempt {self._status.attempt} and must not write"
            )


def restarts(attempts: Sequence[Mapping[str, object]]) -> int:
    """Return the number of attempts that failed and were retried, from the entries of attempts.jsonl."""
    return sum("ended" not in entry for entry in attempts[:-1])


def _append(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
