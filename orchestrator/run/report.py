"""report.json: the summary of a run, from the files in its run directory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from orchestrator.atomic_files import JsonObject, read_lines
from orchestrator.config.schema import JobSpec
from orchestrator.data.corpus import Corpus
from orchestrator.data.packing import Packs, lower_bound
from orchestrator.metrics.meter import last_attempt
from orchestrator.run.recorder import ATTEMPTS, EVALUATIONS, STEPS, WORKERS, restarts
from orchestrator.run.worker_config import training_loader

_RATES = ("tgs", "tgs_trained", "tgs_slots", "tflops_model", "tflops_hardware", "mfu", "hfu")
_MEDIANS = (
    *_RATES,
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
)
_PEAKS = ("memory_peak_bytes", "memory_reserved_peak_bytes", "host_memory_peak_bytes")
PLAN = "plan.json"
_PREDICTED = ("memory_reserved_peak_bytes", "step_seconds", "tgs", "tflops_model", "mfu", "calibrated")
_PACKAGES = ("torch", "deepspeed", "transformers", "ray", "peft", "datasets", "numpy")


def packing_figures(job: JobSpec, corpus: Corpus, packs: Packs) -> JsonObject:
    """Return row and token counts, how full packs are, and the load imbalance between workers.

    Args:
        job: The job.
        corpus: Documents of one epoch.
        packs: Packs of these documents.
    """
    counts = corpus.counts
    # Without padding, up to sequence_parallel_size - 1 slots at the end of a row are ignored here.
    slots = len(packs) * job.data.max_length if job.data.pads_packs else counts.tokens_kept
    batches, _, _ = training_loader(job, corpus, packs)
    by_chance, ordered = batches.wait_factors()
    squares = packs.sums(corpus.lengths**2).astype(float)
    return {
        **vars(counts),
        "packs": len(packs),
        "max_length": job.data.max_length,
        "slots": slots,
        "non_padding_fraction": counts.tokens_kept / slots,
        "lower_bound": lower_bound(corpus.lengths, job.data.max_length),
        "mean_square_tokens": float(squares.sum() / counts.tokens_kept),
        "labelled_share": counts.trained_tokens / slots,
        "largest_labelled_share": float(packs.sums(corpus.trained).max() / job.data.max_length),
        "attention_cost_cv": float(squares.std() / squares.mean()),
        "wait_factor_by_chance": by_chance,
        "wait_factor": ordered,
        "sources": [
            {"path": source.path, **vars(part), "share_of_tokens": part.tokens_kept / counts.tokens_kept}
            for source, part in zip(job.data.train, corpus.source_counts, strict=True)
        ],
    }


def report(
    job: JobSpec, folder: Path, packing: Mapping[str, object], seconds: Mapping[str, float]
) -> JsonObject:
    """Return the summary of a finished run.

    Rates are totals over totals, so that each step is weighted by its duration; medians over steps are
    separate fields.

    Args:
        job: The job as it ran.
        folder: The run directory with steps.jsonl, workers.json and attempts.jsonl.
        packing: As `packing_figures` returns it.
        seconds: Wall time of start, data, training, checkpoints and export.
    """
    steps = last_attempt(read_lines(folder / STEPS))
    attempts = read_lines(folder / ATTEMPTS)
    workers = json.loads((folder / WORKERS).read_text(encoding="utf-8"))
    evaluations = read_lines(folder / EVALUATIONS)
    return {
        "name": job.name,
        "steps": len(steps),
        "epoch": steps[-1]["epoch"],
        "loss": steps[-1]["loss"],
        "first_loss": steps[0]["loss"],
        "evaluation_loss": evaluations[-1]["evaluation_loss"] if evaluations else None,
        "evaluation_losses": evaluations[-1].get("evaluation_losses", {}) if evaluations else {},
        **_totals(steps, {attempt["attempt"]: attempt["world_size"] for attempt in attempts}),
        "medians": {
            name: statistics.median(row[name] for row in steps)
            for name in _MEDIANS
            if all(name in row for row in steps)
        },
        **{
            name: max(row[name] for row in steps if name in row)
            for name in _PEAKS
            if any(name in row for row in steps)
        },
        "packing": dict(packing),
        "nodes": sorted({worker["node"] for worker in workers}),
        "metrics_port": attempts[-1].get("metrics_port"),
        "world_size": len(workers),
        "parallel": {
            "zero_stage": attempts[-1]["zero_stage"],
            "sequence_parallel_size": attempts[-1]["sequence_parallel_size"],
            "offload_optimizer": job.parallel.offload_optimizer,
            "offload_param": job.parallel.offload_param,
            "micro_batch_size": job.optim.micro_batch_size,
            "gradient_accumulation_steps": job.gradient_accumulation_steps,
        },
        "dtype": attempts[-1]["dtype"],
        "device": attempts[-1]["device"],
        "restarts": restarts(attempts),
        "steps_lost": sum(attempt["steps_lost"] for attempt in attempts),
        "predicted": predicted(folder),
        "seconds": dict(seconds),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _totals(steps: Sequence[Mapping[str, float]], workers_of: Mapping[float, int]) -> dict[str, float]:
    """Return totals and rates over the whole run.

    Args:
        steps: The rows of steps.jsonl.
        workers_of: Number of workers by attempt. Rates are those of one, so that each step is weighted by
            its duration times its workers. An attempt whose line was lost with a node counts as the last one.
    """
    last = workers_of[max(workers_of)]
    weights = [row["step_seconds"] * workers_of.get(row["attempt"], last) for row in steps]
    totals = {
        "step_seconds": sum(row["step_seconds"] for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
        "trained_tokens": sum(row["trained_tokens"] for row in steps),
    }
    for name in _RATES:
        if all(name in row for row in steps):
            rates = (row[name] * weight for row, weight in zip(steps, weights, strict=True))
            totals[name] = sum(rates) / sum(weights)
    slots = totals["tgs_slots"] * sum(weights)
    return {**totals, "padding_fraction": 1.0 - totals["tokens"] / slots}


def predicted(run_dir: Path) -> JsonObject | None:
    """Return the prediction of a run in the fields of its report; None if there is none.

    Args:
        run_dir: The run's folder.
    """
    try:
        found = json.loads((run_dir / PLAN).read_text(encoding="utf-8"))
    except OSError:
        return None
    return {name: found[name] for name in _PREDICTED}
