"""Formats reports of finished runs as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import read_object
from orchestrator.errors import SpecError

Report = dict[str, Any]
"""The report.json of a run."""
SUMMARY_FIELDS = (
    "name", "steps", "epoch", "loss", "first_loss", "evaluation_loss", "tgs", "tgs_trained", "tgs_slots",
    "memory_reserved_peak_bytes", "world_size", "nodes", "restarts", "steps_lost", "seconds",
)  # fmt: skip


def read_report(run: Path, fields: Sequence[str] = ("name",)) -> Report:
    """Return the report of a finished run.

    Args:
        run: The run directory.
        fields: Fields that must be present.

    Raises:
        SpecError: There is no report, or it lacks one of the fields.
    """
    found = read_object(run / "report.json")
    if found is None:
        raise SpecError(
            f"{run} has no readable report.json; name the folder STORAGE/NAME of a run that has finished"
        )
    if missing := [name for name in fields if name not in found]:
        raise SpecError(
            f"{run / 'report.json'} lacks {', '.join(missing)}, so it is not the report of a run, or of "
            "another version; name the folder STORAGE/NAME of a run of this version"
        )
    return found


def summary(report: Report) -> str:
    """Return the main results of a run."""
    mfu = f"{report['mfu']:.1%}" if "mfu" in report else "not known for this device"
    evaluation = report["evaluation_loss"]
    rows = {
        "run": report["name"],
        "steps": f"{report['steps']} ({report['epoch']:.2f} epochs)",
        "loss": f"{report['first_loss']:.4f} -> {report['loss']:.4f}",
        "evaluation loss": "no held-out data" if evaluation is None else f"{evaluation:.4f}{_sets(report)}",
        "TGS": f"{report['tgs']:.1f} tokens/GPU/s ({report['tgs_trained']:.1f} trained, "
        f"{report['tgs_slots']:.1f} slots{_expected(report, 'tgs')})",
        "TFLOPs": f"{report['tflops_model']:.4f} model, {report['tflops_hardware']:.4f} hardware, per GPU"
        if "tflops_model" in report
        else "not known for this architecture",
        "MFU": mfu,
        "memory": _memory(report),
        "workers": f"{report['world_size']} on {', '.join(report['nodes'])}",
        "restarts": f"{report['restarts']} ({report['steps_lost']} steps done again)",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()),
    }
    return table(rows)


def _sets(report: Report) -> str:
    """Return the loss of each evaluation set, if there are several."""
    losses = report.get("evaluation_losses") or {}
    parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return f" ({parts})" if len(losses) > 1 else ""


def _expected(report: Report, name: str) -> str:
    """Return the predicted value of a metric, if there is one."""
    found = (report.get("predicted") or {}).get(name)
    return "" if found is None else f"; {found:.1f} predicted"


def _memory(report: Report) -> str:
    """Return measured and predicted peak memory."""
    said = f"{report['memory_reserved_peak_bytes'] / 2**30:.2f} GiB held by the fullest worker"
    expected = report.get("predicted")
    return f"{said}, {expected['memory_reserved_peak_bytes'] / 2**30:.2f} predicted" if expected else said


def side_by_side(reports: list[Report]) -> str:
    """Return the main metrics of several runs, one per column."""
    names = (
        "loss",
        "evaluation_loss",
        "tgs",
        "tflops_model",
        "mfu",
        "step_seconds",
        "world_size",
        "restarts",
    )
    header = ["".ljust(18), *(str(report["name"]).rjust(14) for report in reports)]
    lines = ["  ".join(header)]
    for name in names:
        values = [report.get(name) for report in reports]
        cells = ["-" if value is None else f"{value:.5g}" for value in values]
        lines.append("  ".join([name.ljust(18), *(cell.rjust(14) for cell in cells)]))
    return "\n".join(lines)


def table(rows: Mapping[str, object]) -> str:
    """Return one line per name and value."""
    width = max(len(name) for name in rows)
    return "\n".join(
        f"{name.ljust(width)}  {value:.4f}" if isinstance(value, float) else f"{name.ljust(width)}  {value}"
        for name, value in rows.items()
    )


def packing_table(figures: Mapping[str, Any]) -> str:
    """Return packing statistics as a table, with a line for each source if there are several."""
    rows = {name: value for name, value in figures.items() if name not in ("sources", "evaluation")}
    for key in ("fields_without_effect", "notes"):
        counts = figures[key].items()
        rows[key] = ", ".join(f"{name} ({count} rows)" for name, count in counts) or "none"
    sources = figures["sources"] if len(figures["sources"]) > 1 else []
    lines = [f"{source['share_of_tokens']:.1%} of the tokens from {source['path']}" for source in sources]
    lines += [
        f"evaluation set {held['name']}: {held['rows']:,} rows, {held['trained_tokens']:,} trained tokens"
        for held in figures.get("evaluation", ())
    ]
    return "\n".join([table(rows), *lines])


def result_texts(
    runs: Sequence[Path], compare: bool, warmup_steps: int, layout: str | None, as_json: bool
) -> Iterator[str]:
    """Yield what `orchestrator report` prints for runs and sweeps.

    Args:
        runs: Run directories, or folders of sweeps.
        compare: Compare the first two.
        warmup_steps: Initial steps of a run that the comparison ignores.
        layout: Table layout of a sweep; None takes that of the sweep.
        as_json: Yield JSON instead of tables.

    Raises:
        SpecError: A folder has no results, or not two folders are to be compared.
    """
    from orchestrator.bench.report import is_sweep

    if compare:
        if len(runs) != 2:
            raise SpecError(f"--compare requires two folders (got {len(runs)}); pass A and B")
        from orchestrator.bench.compare import compare as compare_two

        comparison = compare_two(runs[0], runs[1], warmup_steps)
        yield (comparison.json() if as_json else comparison.markdown()).rstrip()
    elif any(is_sweep(run) for run in runs):
        from orchestrator.bench.report import load

        for run in runs:
            sweep_table, _ = load(run, layout)
            yield (sweep_table.json() if as_json else sweep_table.markdown()).rstrip()
    else:
        is_single_table = len(runs) == 1 and not as_json
        reports = [read_report(run, SUMMARY_FIELDS if is_single_table else ("name",)) for run in runs]
        if as_json:
            yield json.dumps(reports)
        else:
            yield summary(reports[0]) if is_single_table else side_by_side(reports)
