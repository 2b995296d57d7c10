"""Compare the planner's predictions with published measurements.

    python -m tests.benchmarks.planner --measurements FILE [--json] [--no-peers]

Errors are |predicted - measured| / measured. The top-level keys use two calibration parameters per software
stack, fitted to the other rows (leave-one-out); `uncalibrated` uses none, and `left_out` also excludes all
rows of the page with the same model, length or method. `fits_refused` counts rows that ran although the
planner predicts more memory than the GPU has, `oom_missed` rows that ran out of memory although it predicts
that they fit. The same rows are predicted with DeepSpeed's estimators, and XTuner's TFLOPs column is
recomputed from its TGS column.

Median and p90 errors on 120 rows of five pages (described in tests/benchmarks/measurements.py):

| | memory | TGS | out of memory missed | ran and refused |
|---|---|---|---|---|
| two parameters per stack, leave-one-out | 2.6 %, 7.4 % | 4.2 %, 16.2 % | 0 of 2 | 0 of 118 |
| uncalibrated | 4.6 %, 24.1 % | 10.8 %, 29.5 % | 1 | 0 |
| rows of the same model left out | 2.6 %, 14.8 % | 10.9 %, 34.3 % | 1 | 0 |
| rows of the same length left out | 2.7 %, 12.5 % | 4.9 %, 14.8 % | 1 | 0 |
| rows of the same method left out | 4.6 %, 24.1 % | 24.1 %, 40.5 % | 1 | 0 |

On random subsets of 60 rows (20 draws), leave-one-out errors are 2.6 % and 8.8 % for memory and 6.5 % and
23.7 % for TGS on average: with fewer rows per stack the fit is worse, and the verdict of a row within 3 % of
its GPU's memory may be wrong.

The general constants of orchestrator/planner were chosen with these rows, so leave-one-out errors are
optimistic. Two of the five pages have one model, so they are uncalibrated if that model is left out.
docs/benchmarks.md has uncalibrated errors of pages that were not used to choose any constant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.arch.flops import flops_per_token_xtuner, forward_flops, model_flops
from orchestrator.planner.calibration import MemoryParams, verdict
from orchestrator.planner.memory import GIB
from orchestrator.planner.step_time import TimeParams
from tests.benchmarks.environment import say
from tests.benchmarks.leave_out import Case, Same, alike, case_of, itself, memory_constants, time_constants
from tests.benchmarks.measurements import Measurement, read

WORST = 12
Predictor = Callable[[Case], tuple[MemoryParams, TimeParams]]


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and throughput of a row.

    Attributes:
        case: The row.
        memory_gib: Peak memory per GPU in GiB.
        tgs: Tokens per GPU and second.
        refused: Whether the verdict is "does not fit".
    """

    case: Case
    memory_gib: float
    tgs: float
    refused: bool

    @property
    def memory_error(self) -> float | None:
        """Signed relative error of memory; None if memory was not measured."""
        measured = self.case.row.memory_gib
        return None if not measured else self.memory_gib / measured - 1.0

    @property
    def tgs_error(self) -> float | None:
        """Signed relative error of TGS; None if TGS was not measured."""
        measured = self.case.row.tgs
        return None if not measured else self.tgs / measured - 1.0


def predict(case: Case, memory: MemoryParams, time: TimeParams) -> Prediction:
    """Return the prediction of a row with the parameters of its stack."""
    return Prediction(
        case=case,
        memory_gib=memory.peak(case.memory) / GIB,
        tgs=case.step_tokens / case.steps.step(time).total,
        refused=verdict(memory.needed(case.memory), case.device.memory_bytes) == "does not fit",
    )


def cases_of(rows: Sequence[Measurement]) -> tuple[list[Case], list[dict[str, str]]]:
    """Return the cases of rows that can be predicted, and id, source and reason of the others."""
    spanning = {row.stack for row in rows if row.spans_nodes}
    found, unusable = [], []
    for row in rows:
        try:
            found.append(case_of(row, row.stack in spanning))
        except (ValueError, ArithmeticError) as error:
            unusable.append({"id": row.name, "source": row.source, "reason": str(error)})
    return found, unusable


def uncalibrated(_case: Case) -> tuple[MemoryParams, TimeParams]:
    """Return the default parameters, for a predictor without calibration."""
    return MemoryParams(), TimeParams()


def calibrated(cases: Sequence[Case], same: Same = itself) -> Predictor:
    """Return a predictor that fits parameters to the cases that `same` does not exclude."""
    return lambda case: (memory_constants(case, cases, same), time_constants(case, cases, same))


def figures(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return median and p90 errors, and the counts of wrong verdicts."""
    memory = [abs(each.memory_error) for each in predictions if each.memory_error is not None]
    tgs = [abs(each.tgs_error) for each in predictions if each.tgs_error is not None]
    failed = [each for each in predictions if each.case.row.out_of_memory]
    ran = [each for each in predictions if not each.case.row.out_of_memory]
    return {
        "memory_median_error": _quantile(memory, 50),
        "memory_p90_error": _quantile(memory, 90),
        "tgs_median_error": _quantile(tgs, 50),
        "tgs_p90_error": _quantile(tgs, 90),
        "oom_missed": sum(not each.refused for each in failed),
        "fits_refused": sum(each.refused for each in ran),
        "memory_rows": len(memory),
        "tgs_rows": len(tgs),
        "oom_rows": len(failed),
    }


def by_source(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Return the errors per page."""
    sources = sorted({each.case.row.source for each in predictions})
    return {name: figures([each for each in predictions if each.case.row.source == name]) for name in sources}


def worst(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return the `WORST` rows with the largest absolute errors."""
    found = []
    for each in predictions:
        row = each.case.row
        pairs = (("memory_gib", each.memory_error, each.memory_gib, row.memory_gib),
                 ("tgs", each.tgs_error, each.tgs, row.tgs))  # fmt: skip
        for what, error, predicted, measured in pairs:
            if error is not None:
                found.append(
                    {
                        "id": row.name, "stack": row.stack, "model": row.text("model"), "what": what,
                        "measured": measured, "predicted": round(predicted, 3), "error": round(error, 4),
                    }
                )  # fmt: skip
    return sorted(found, key=lambda entry: -abs(float(str(entry["error"]))))[:WORST]


def constants(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Return the parameters of each stack, fitted to all of its rows."""
    found = {}
    nobody: Same = lambda _case, _other: False  # noqa: E731
    for stack in sorted({case.row.stack for case in cases}):
        case = next(each for each in cases if each.row.stack == stack)
        memory, time = memory_constants(case, cases, nobody), time_constants(case, cases, nobody)
        found[stack] = {
            "rows": sum(each.row.stack == stack for each in cases),
            "offset_gib": round(memory.offset_bytes / GIB, 2),
            "activation_factor": round(memory.activation_factor, 3),
            "efficiency": round(time.efficiency, 3),
            "launch_factor": round(time.launch_factor, 3),
            "network_factor": round(time.network_factor, 3),
        }
    return found


def deepspeed_estimators(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Return the errors of DeepSpeed's estimators on the same rows, or None if DeepSpeed is not installed."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, which may have to be JSON
        return _deepspeed_estimators(cases)


def _deepspeed_estimators(cases: Sequence[Case]) -> dict[str, Any] | None:
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError:
        return None
    errors, refused, missed = [], 0, 0
    for case in cases:
        work, found = case.work, case.work.model.parameters
        spread = {
            "num_gpus_per_node": work.gpus_per_node,
            "num_nodes": max(1, work.world_size // work.gpus_per_node),
        }
        if work.zero_stage == 3:
            gpu = zero3(
                found.total, max(found.per_layer, found.embedding), **spread,
                cpu_offload=work.offload_optimizer, cpu_offload_params=work.offload_param,
            )[1]  # fmt: skip
        else:
            gpu = zero2(found.total, **spread, cpu_offload=work.offload_optimizer)[1]
        fits = gpu <= case.device.memory_bytes
        missed += case.row.out_of_memory and fits
        refused += not case.row.out_of_memory and not fits
        if case.row.memory_gib:
            errors.append((work.method, abs(gpu / GIB / case.row.memory_gib - 1.0)))
    return {
        "memory_median_error": _quantile([error for _, error in errors], 50),
        "memory_p90_error": _quantile([error for _, error in errors], 90),
        "memory_median_error_full_parameters": _quantile([e for method, e in errors if method == "full"], 50),
        "oom_missed": missed,
        "fits_refused": refused,
    }


def xtuner(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return XTuner's published TFLOPs, the TFLOPs by its formula from its TGS, and the actual MFU."""
    found = []
    for case in cases:
        printed, tgs, shape = case.row.number("tflops_as_printed"), case.row.tgs, case.work.model.shape
        peak = case.device.peak_flops("bf16")
        if not printed or not tgs or not peak:
            continue
        length = case.work.length_tokens
        ours = tgs * flops_per_token_xtuner(shape, length) / 1e12
        true = tgs * model_flops(forward_flops(shape, length, float(length) ** 2, length)) / length
        found.append(
            {
                "id": case.row.name, "model": case.row.text("model"), "max_length": length,
                "printed": printed, "from_tgs": round(ours, 2), "error": round(ours / printed - 1.0, 5),
                "mfu": round(true / peak, 4),
            }
        )  # fmt: skip
    return found


def compare(path: Path, peers: bool = True) -> dict[str, Any]:
    """Return all errors for a file of measurements.

    Args:
        path: CSV file.
        peers: Whether to run DeepSpeed's estimators as well.
    """
    rows = read(path)
    cases, unusable = cases_of(rows)
    said = _predictions(cases, calibrated(cases))
    plain = _predictions(cases, uncalibrated)
    strict = {
        field: figures(_predictions(cases, calibrated(cases, alike(field))))
        for field in ("model", "max_length", "method")
    }
    return {
        **figures(said),
        "by_source": by_source(said),
        "worst": worst(said),
        "uncalibrated": {**figures(plain), "by_source": by_source(plain)},
        "left_out": strict,
        "constants": constants(cases),
        "wrong_verdicts": [
            each.case.row.name for each in said if each.refused != each.case.row.out_of_memory
        ],
        "deepspeed_estimators": deepspeed_estimators(cases) if peers else None,
        "xtuner": xtuner(cases),
        "rows": len(rows),
        "unusable": unusable,
    }


def _predictions(cases: Sequence[Case], predictor: Predictor) -> list[Prediction]:
    return [predict(case, *predictor(case)) for case in cases]


def _quantile(values: Sequence[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 4) if values else None


def table(found: Mapping[str, Any]) -> str:
    """Return the errors as a text table."""
    lines = [f"{'':34}{'memory: rows  median    p90':>30}{'TGS: rows  median    p90':>30}  missed refused"]
    parts: list[tuple[str, Mapping[str, Any]]] = [
        ("two constants a stack", found),
        *found["by_source"].items(),
    ]
    parts.append(("uncalibrated", found["uncalibrated"]))
    parts += [(f"left out: same {field}", each) for field, each in found["left_out"].items()]
    for name, each in parts:
        errors = "".join(
            f"{each[f'{kind}_rows']:>16}"
            + _percent(each[f"{kind}_median_error"])
            + _percent(each[f"{kind}_p90_error"])
            for kind in ("memory", "tgs")
        )
        lines.append(f"{name:34}{errors}{each['oom_missed']:>8}{each['fits_refused']:>8}")
    peer = found["deepspeed_estimators"]
    if peer:
        memory = f"{_percent(peer['memory_median_error'])}{_percent(peer['memory_p90_error'])}"
        lines.append(f"{'DeepSpeed estimators':50}{memory}{peer['oom_missed']:>38}{peer['fits_refused']:>8}")
    lines += [f"not usable: {each['id']}: {each['reason']}" for each in found["unusable"]]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:6.1f}%"


def main() -> None:
    """Print the errors as a table, or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measurements", type=Path, required=True, help="CSV in the schema of the module")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-peers", action="store_true", help="leave out DeepSpeed's estimators")
    arguments = parser.parse_args()
    found = compare(arguments.measurements, peers=not arguments.no_peers)
    say(json.dumps(found, indent=1) if arguments.json else table(found))


if __name__ == "__main__":
    main()
