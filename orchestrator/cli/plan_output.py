"""Runs the search of `orchestrator plan` and formats its result as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.arch.hf_config import load_config_json, resized
from orchestrator.cluster.cluster_spec import ClusterSpec, ClusterSpecError
from orchestrator.cluster.hardware import CatalogueError, UnknownDevice
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.planner.calibration_store import load_calibration, software_stack_of
from orchestrator.planner.formatting import (
    GIB,
    format_changes,
    format_prediction,
    format_seconds,
    format_suggestions,
    format_value,
)
from orchestrator.planner.plan import FIELDS, Candidate, Plan, Suggestion
from orchestrator.planner.search import predict_job, search, suggest_changes
from orchestrator.planner.workload import DataShape

_PARTS = {
    "weights": "resident weights",
    "gradients": "resident gradients",
    "optimizer": "optimizer's state, fp32 copies",
    "gathered_params": "parameters gathered by ZeRO-3",
    "buffers": "gradient buckets",
    "activations": "saved for the backward pass",
    "layer": "one layer's backward pass",
    "logits": "logits and loss",
    "step": "the optimizer's step",
    "quantization": "a dequantized weight",
    "context": "CUDA, NCCL",
    "fragmentation": "fragmentation by varying lengths",
    "retained": "cached by the allocator",
    "linear": "matmuls with weights",
    "attention": "attention",
    "elementwise": "norms, gates, loss (memory-bound)",
    "dequantization": "dequantizing weights",
    "launch": "kernel launches",
    "zero": "exposed ZeRO communication within nodes",
    "ulysses": "Ulysses all-to-all within nodes",
    "network": "communication between nodes",
    "fetch": "fetching offloaded parameters",
    "offload": "offloaded state: copies, CPU Adam",
}


def planned(
    job: JobSpec,
    gpus: str,
    catalogue: Path | None = None,
    plots: Path | None = None,
    document_tokens: float = 0.0,
    network_gbits: float | None = None,
) -> tuple[Plan, list[Suggestion]]:
    """Return the plan of a job, and suggestions if the job as written does not fit.

    Args:
        job: The job.
        gpus: ClusterSpec, as `ClusterSpec.parse` takes them.
        catalogue: The user's own devices.
        plots: Folder for plots over max_length; None for no plots.
        document_tokens: Length of a token's document, averaged over tokens; 0 for whole packs.
        network_gbits: Network bandwidth per node in Gbit/s; None for the value of the catalogue.

    Raises:
        SpecError: The cluster, a device or the model are not known.
    """
    config = resized(load_config_json(job.model.path), job.model)
    try:
        cluster = ClusterSpec.parse(gpus, catalogue)
    except (ClusterSpecError, UnknownDevice, CatalogueError) as error:
        raise SpecError(f"--gpus {gpus}: {error}") from None
    if network_gbits is not None:
        cluster = cluster.with_network(network_gbits)
    stack = software_stack_of(predict_job(job, config, cluster).prediction.work, cluster)
    calibration = load_calibration(stack)
    data = DataShape(document_tokens=document_tokens)
    found = search(job, config, cluster, calibration, data)
    if plots:
        from orchestrator.cli.plan_plots import draw

        draw(job, config, cluster, calibration, plots, data)
    enough = job.parallel.workers <= cluster.gpus
    fits = enough and found.asked.prediction.verdict != "does not fit"
    return found, [] if fits else suggest_changes(job, config, cluster, calibration, data)


def as_json(plan: Plan, remedies: Sequence[Suggestion]) -> str:
    """Return a plan as JSON."""
    return json.dumps(
        {
            "machines": str(plan.cluster),
            "parameters": plan.asked.prediction.work.model.parameters.total,
            "considered": plan.considered,
            "asked": _candidate(plan.asked),
            "best": plan.best and {**_candidate(plan.best), "changes": plan.asked.changes_to(plan.best)},
            "others": [_candidate(each) for each in plan.others],
            "remedies": [{"changes": dict(each.changes), **_candidate(each.candidate)} for each in remedies],
        }
    )


def text(plan: Plan, remedies: Sequence[Suggestion], explain: bool, rows: int = 8) -> str:
    """Return a plan as text.

    Args:
        plan: The plan.
        remedies: Suggestions if the job as written does not fit.
        explain: Whether to list memory and time by part, and all alternatives.
        rows: Number of alternatives to list without `explain`.
    """
    lines = [_heading(plan), "", f"as written  {format_prediction(plan.asked.prediction)}"]
    if plan.best is None:
        lines += ["planned     nothing fits", "", *format_suggestions(remedies)]
        return "\n".join(lines)
    changes = plan.asked.changes_to(plan.best)
    lines += [
        f"planned     {format_prediction(plan.best.prediction)}",
        f"            {format_changes(changes)}",
    ]
    lines += list(_idle(plan))
    if remedies:
        lines += ["", *format_suggestions(remedies)]
    listed = plan.others if explain else plan.others[:rows]
    table = [_row(each, plan.best) for each in (plan.best, *listed)]
    lines += ["", *_columns([_TITLES, *table])]
    if len(listed) < len(plan.others):
        lines.append(
            f"and {len(plan.others) - len(listed)} more ways, of {plan.considered:,} plans; see --explain"
        )
    if explain:
        lines += ["", *_explained(plan.best)]
    return "\n".join(lines)


def _candidate(candidate: Candidate) -> dict[str, object]:
    return {"settings": candidate.settings, **candidate.prediction.as_json()}


def _heading(plan: Plan) -> str:
    job, work = plan.asked.job, plan.asked.prediction.work
    seen = "whole packs" if job.data.cross_document_attention else "whole packs, an upper limit"
    if work.mean_square_tokens:
        seen = f"documents of {work.mean_square_tokens:,.0f} tokens"
    return (
        f"{job.model.path} on {plan.cluster}: {work.model.parameters.total:,} parameters, "
        f"{work.num_trainable_params:,} trained, packs of {work.length_tokens:,} tokens, "
        f"{job.optim.global_batch_size} a step, attention over {seen}"
    )


def _idle(plan: Plan) -> Iterator[str]:
    workers = plan.best.job.parallel.workers if plan.best else 0
    asked = plan.asked.job.parallel.workers
    if asked > plan.cluster.gpus:
        yield f"            as written it asks for {asked:,} workers, of {plan.cluster.gpus:,} GPUs"
    if 0 < workers < plan.cluster.gpus:
        yield (
            f"            {plan.cluster.gpus - workers:,} of {plan.cluster.gpus:,} GPUs stay idle: more "
            f"workers are not faster, or optim.global_batch_size={plan.asked.job.optim.global_batch_size} "
            "cannot be dealt to them"
        )


_TITLES = ("ZeRO", "offload", "sp", "workers", "rows", "kept", "GPU GiB", "host GiB", "s/step", "TGS", "")


def _row(candidate: Candidate, best: Candidate) -> tuple[str, ...]:
    job, found = candidate.job, candidate.prediction
    parallel = job.parallel
    moved = [
        name
        for name in ("optimizer", "param", "activations")
        if getattr(parallel, f"offload_{name}") != "none"
    ]
    return (
        str(parallel.zero_stage),
        "+".join(moved) or "-",
        str(parallel.sequence_parallel_size),
        str(parallel.workers),
        str(job.optim.micro_batch_size),
        {"full": "inputs", "selective": "products", "none": "all"}[job.model.gradient_checkpointing],
        f"{found.needed_bytes / GIB:.1f}",
        f"{found.host_bytes_per_node / GIB:.0f}",
        "-" if found.seconds is None else format_seconds(found.seconds),
        "-" if found.tgs is None else f"{found.tgs:,.0f}",
        "taken" if candidate is best else _why_not(candidate, best),
    )


def _why_not(candidate: Candidate, best: Candidate) -> str:
    """Return why a candidate loses against the one that is taken."""
    found, taken = candidate.prediction, best.prediction
    if found.verdict == "does not fit":
        host = found.host_capacity_bytes
        if host is not None and found.host_bytes_per_node > host:
            return f"does not fit: hosts have {host / GIB:.0f} GiB"
        parts = found.memory.by_part()
        largest = sorted(parts, key=lambda name: -parts[name])[:2]
        named = ", ".join(f"{name} {parts[name] / GIB:.0f}" for name in largest)
        return f"does not fit: {named}"
    if found.time is None or taken.time is None:
        return "needs more memory"
    slower = candidate.seconds_per_pack / best.seconds_per_pack - 1
    mine, its = found.time.by_part(), taken.time.by_part()
    scale = best.job.optim.global_batch_size / candidate.job.optim.global_batch_size
    worse = max(mine, key=lambda name: mine[name] * scale - its[name])
    near = "no margin; " if found.verdict == "tight" else ""
    if slower < 0.005:
        return f"{near}as fast, for more: {_more(candidate, best)}"
    return f"{near}{slower:+.0%}: {worse} {its[worse]:.3g} -> {mine[worse]:.3g} s"


def _more(candidate: Candidate, best: Candidate) -> str:
    changes = best.changes_to(candidate)
    return ", ".join(f"{name.rpartition('.')[2]}={format_value(value)}" for name, value in changes.items())


def _explained(best: Candidate) -> Iterator[str]:
    found = best.prediction
    yield "memory of a GPU at its largest, GiB"
    yield from _parts(found.memory.by_part(), 1 / GIB)
    moments = {"at the loss": found.memory.loss_peak, "in the backward pass": found.memory.backward_peak}
    moments["in the step"] = found.memory.step_peak
    yield "  " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in moments.items())
    if found.time is not None:
        yield "seconds of a step"
        yield from _parts(found.time.by_part(), 1.0)
    yield "settings: " + ", ".join(f"{name}={format_value(best.settings[name])}" for name in FIELDS)


def _parts(parts: Mapping[str, float], scale: float) -> Iterator[str]:
    total = sum(parts.values())
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        if value > 0.001 * total:
            yield f"  {name.ljust(15)} {value * scale:10.3f}  {_PARTS.get(name, '')}"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        *cells, last = row
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)), last])
