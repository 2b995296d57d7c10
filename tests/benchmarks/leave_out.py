"""Predictions of published rows: as they are, and with two constants a stack from all rows but some.

A stack's constants are fitted to its own rows and start from those of its page (of memory, from those for
full parameters or for adapters), which start from none. The row that is predicted is in neither fit, nor, in
stricter checks, is any row of its page with the same model, length or method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.cluster.hardware import Device, device
from orchestrator.planner.calibration import (
    MemoryParams,
    PriorStd,
    Seconds,
    fit_memory,
    fit_time,
    predicted_seconds,
)
from orchestrator.planner.memory import GIB, GpuMemory, gpu_memory
from orchestrator.planner.step_time import MicroSteps, TimeParams, micro_steps
from orchestrator.planner.workload import Workload
from tests.benchmarks.measurements import Measurement, context_bytes, timed_workload_of_row, workload_of_row

Same = Callable[["Case", "Case"], bool]
_WITHIN_A_PAGE = PriorStd(offset_bytes=3 * GIB, log_factor=0.06)


@dataclass(frozen=True)
class Case:
    """A row with all that its prediction needs, made once.

    Attributes:
        row: As read.
        work: What it trained.
        device: On what.
        memory: Its memory by part.
        steps: Its time by part.
        step_tokens: Tokens of a GPU's optimizer step that its TGS counts.
        spans_nodes: Whether any row of its stack has workers on several nodes.
        seconds: What a fit of time tries.
    """

    row: Measurement
    work: Workload
    device: Device
    memory: GpuMemory
    steps: MicroSteps
    step_tokens: float
    spans_nodes: bool
    seconds: Seconds

    @property
    def measured_seconds(self) -> float:
        """Seconds of a step that its TGS stands for."""
        return self.step_tokens / (self.row.tgs or float("nan"))


def case_of(row: Measurement, spans_nodes: bool) -> Case:
    """Return what a row's prediction needs.

    Raises:
        ValueError: Its model, GPU or settings are not known.
    """
    work, gpu = workload_of_row(row), device(row.text("gpu") or "")
    timed, tokens = timed_workload_of_row(row)
    steps = micro_steps(timed, gpu)
    return Case(
        row=row,
        work=work,
        device=gpu,
        memory=gpu_memory(work, context_bytes(row)),
        steps=steps,
        step_tokens=tokens * work.gradient_accumulation_steps,
        spans_nodes=spans_nodes,
        seconds=predicted_seconds(steps, spans_nodes),
    )


def itself(case: Case, other: Case) -> bool:
    """Leave out the row that is predicted."""
    return case is other


def alike(field: str) -> Same:
    """Leave out the rows of a page that have the same value in a field."""
    return lambda case, other: (
        case.row.source == other.row.source and case.row.text(field) == other.row.text(field)
    )


def memory_constants(case: Case, cases: Sequence[Case], same: Same = itself) -> MemoryParams:
    """Return the constants of a case's stack, from the cases that are not left out."""
    rows = [each for each in cases if each.row.memory_gib and not same(case, each)]
    page = fit_memory([_measured(each) for each in rows if _related(each, case)])
    own = [_measured(each) for each in rows if each.row.stack == case.row.stack]
    return fit_memory(own, page, _WITHIN_A_PAGE)


def time_constants(case: Case, cases: Sequence[Case], same: Same = itself) -> TimeParams:
    """Return the constants of a case's stack, from the cases that are not left out."""
    rows = [
        each
        for each in cases
        if each.row.tgs and each.spans_nodes == case.spans_nodes and not same(case, each)
    ]
    near = [(each.seconds, each.measured_seconds) for each in rows if each.row.source == case.row.source]
    page = fit_time(near, case.spans_nodes)
    own = [(each.seconds, each.measured_seconds) for each in rows if each.row.stack == case.row.stack]
    return fit_time(own, case.spans_nodes, page, 0.7)


def _related(case: Case, other: Case) -> bool:
    return (case.row.source, case.work.method) == (other.row.source, other.work.method)


def _measured(case: Case) -> tuple[GpuMemory, float]:
    return case.memory, (case.row.memory_gib or 0.0) * GIB
