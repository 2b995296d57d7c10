"""Runs the cells of a sweep in separate processes and appends one result row per cell."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import read_lines, read_object, read_value, write_json
from orchestrator.bench import results
from orchestrator.bench.cell import INSTRUCTIONS, OUTCOME
from orchestrator.bench.report import describe, foreign_file
from orchestrator.bench.results import Row, label
from orchestrator.bench.sweep import Cell, Sweep
from orchestrator.checks.owned_files import RUN_FILES, remove_own
from orchestrator.config import loader
from orchestrator.config.paths import module_command
from orchestrator.errors import ClusterError, SpecError

CELLS = "cells"
_LOG, _LOCK = "driver.log", ".lock"
_SECONDS_TO_STOP = 60.0
_TRIES = 2  # on a busy machine Ray may not start in time
Tell = Callable[[str], None]


def run_cells(sweep: Sweep, address: str | None, tell: Tell, retry_failed: bool = False) -> list[Row]:
    """Run every cell without a result, in order, and return the rows of all cells.

    Args:
        sweep: The sweep.
        address: Address of a Ray cluster; None starts a local Ray instance for each cell.
        tell: Called with a line of progress before and after each cell.
        retry_failed: Whether to rerun failed cells; cells that ran out of memory are not rerun.

    Raises:
        SpecError: The sweep would overwrite files that it did not write.
        ClusterError: The storage is not writable, or the same sweep is running there.
    """
    folder = sweep.folder
    if name := foreign_file(folder):
        raise SpecError(
            f"{folder} holds a {name} that no sweep wrote, and this one would overwrite it; move it away, or "
            "give the sweep another name"
        )
    try:
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
        with _alone(folder) as lock:
            describe(folder, sweep.spec.name, sweep.spec.layout, [cell.name for cell in sweep.cells])
            known = _rows(folder)
            for number, cell in enumerate(sweep.cells, start=1):
                where = f"[{number}/{len(sweep.cells)}] {label(cell.fields) or cell.name}"
                row = known.get(cell.name)
                if row is None or (retry_failed and row.status == "failed"):
                    tell(f"{where} ...")
                    row = known[cell.name] = _measure(sweep, cell, address, lock)
                    results.append(folder, row)
                    tell(f"{where}: {in_words(row)}")
                else:
                    tell(f"{where}: {in_words(row)} (as measured before)")
    except OSError as error:
        raise ClusterError(
            f"the sweep's folder {folder} cannot be written ({error.strerror}); name another storage"
        ) from None
    return [known[cell.name] for cell in sweep.cells]


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Lock the folder of the sweep and yield the lock's file descriptor, which cell processes inherit.

    If an earlier sweep was killed, its last cell may still be shutting down, so this waits for the lock.

    Raises:
        ClusterError: Another process still holds the lock after `_SECONDS_TO_STOP`.
    """
    with (folder / _LOCK).open("w", encoding="utf-8") as file:
        deadline = time.monotonic() + _SECONDS_TO_STOP
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"another sweep is at work in {folder}; wait for it, stop it, or give this one "
                        "another name"
                    ) from None
            time.sleep(0.5)
        yield file.fileno()


def _rows(folder: Path) -> dict[str, Row]:
    return {row.cell: row for row in results.read(folder)} if (folder / results.RESULTS).exists() else {}


def in_words(row: Row) -> str:
    """Return a one-line summary of a cell's result."""
    if row.status == "out_of_memory":
        return f"out of memory ({row.reason})"
    tgs, seconds = row.reading("tgs"), row.reading("step_seconds")
    if row.status == "failed" or tgs is None or seconds is None:
        return f"failed: {row.reason}"
    memory = row.peaks.get("memory_peak_bytes", 0.0) / 2**20
    return (
        f"TGS {tgs.median:.1f} ±{tgs.spread:.1%}, step {seconds.median:.3f} s over {tgs.count} steps, "
        f"{memory:,.0f} MiB"
    )


def _measure(sweep: Sweep, cell: Cell, address: str | None, lock: int) -> Row:
    """Run a cell and return its row; retry once if the cluster failed rather than the job."""
    run_dir = sweep.folder / CELLS / cell.name
    for _ in range(_TRIES):
        outcome = _try(sweep, cell, address, lock)
        if not outcome.get("machines"):
            break
    return _row(sweep, cell, run_dir, outcome)


def _try(sweep: Sweep, cell: Cell, address: str | None, lock: int) -> dict[str, Any]:
    """Run a cell in a new process group after removing the files of an earlier try; return its outcome."""
    run_dir = sweep.folder / CELLS / cell.name
    remove_own(run_dir, own_files(run_dir))
    run_dir.mkdir(exist_ok=True)
    gib = sweep.spec.memory_limit_gib
    asked = {
        "job": loader.dump(cell.job),
        "address": address,
        "memory_limit_bytes": None if gib is None else int(gib * 2**30),
    }
    write_json(run_dir / INSTRUCTIONS, asked)
    ended = _run_process(run_dir, sweep.spec.timeout_minutes, lock)
    return read_object(run_dir / OUTCOME) or {"status": "failed", "reason": ended}


def own_files(run_dir: Path) -> list[str]:
    """Return the files in a run directory that a cell process writes; other files are kept."""
    logs = [path.relative_to(run_dir).as_posix() for path in run_dir.glob("logs/**/*.log")]
    return [INSTRUCTIONS, OUTCOME, _LOG, *RUN_FILES, *logs]


def _row(sweep: Sweep, cell: Cell, run_dir: Path, outcome: dict[str, Any]) -> Row:
    """Return the result row of a cell from its outcome and the files of its run directory."""
    samples = results.samples_of(run_dir, sweep.spec.warmup_steps)
    if outcome["status"] == "ok" and not samples:
        outcome |= {"status": "failed", "reason": _no_steps(run_dir, sweep.spec.warmup_steps)}
    succeeded = outcome["status"] == "ok"
    report = read_object(run_dir / results.REPORT) or {}
    workers = read_value(run_dir / results.WORKERS) or []
    machines = {
        "nodes": len({worker["node"] for worker in workers}),
        "devices": sorted({worker["device"] for worker in workers}),
    }
    return Row(
        cell=cell.name,
        fields=dict(cell.fields),
        job=cell.job.model_dump(mode="json"),
        status=outcome["status"],
        reason=outcome["reason"],
        samples=samples if succeeded else {},
        peaks=results.peaks_of(run_dir) if succeeded else {},
        packing=report.get("packing", {}),
        seconds=report.get("seconds", {}),
        shape=outcome.get("shape"),
        environment={**outcome.get("environment", {}), **(machines if workers else {})},
    )


def _no_steps(run_dir: Path, warmup_steps: int) -> str:
    steps = len(read_lines(run_dir / results.STEPS))
    return (
        f"the run has {steps} steps and warmup_steps={warmup_steps} leaves none to measure; set steps, or "
        "lower warmup_steps"
    )


def _run_process(run_dir: Path, timeout_minutes: float | None, lock: int) -> str:
    """Run a cell process until it exits; return how it ended, as the reason if it wrote no outcome."""
    with (run_dir / _LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*module_command("orchestrator.bench.cell"), str(run_dir)],
            stdin=subprocess.PIPE,  # never written to: the cell ends when it is closed
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            code = process.wait(None if timeout_minutes is None else timeout_minutes * 60.0)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"it took longer than timeout_minutes={timeout_minutes:g}; see {run_dir / _LOG}"
        except BaseException:
            _stop(process)
            raise
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its driver {how}; see {run_dir / _LOG}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a cell process, which stops its workers and Ray; kill its process group after a timeout."""
    process.terminate()
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
