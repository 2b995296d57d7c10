"""Leave-one-out predictions of published rows, with calibration parameters fitted per software stack.

The parameters of a stack are fitted to its own rows, with a prior fitted to all rows of its page (for memory,
to the rows with full parameters or with adapters). Neither fit includes the row that is predicted; stricter
checks also leave out all rows of its page with the same model, length or method.
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
    """A row with the inputs of its prediction, computed once.

    Attributes:
        row: The row as read from the CSV.
        work: The workload that it trained.
        device: Its GPU.
        memory: Predicted memory by part, in bytes.
        steps: Predicted micro-step time by part, in seconds.
        step_tokens: Tokens of one optimizer step per GPU, as counted by the page's TGS.
        spans_nodes: Whether any row of its stack has workers on several nodes.
        seconds: The step time as a function of the parameters, evaluated by the fit.
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
        """Seconds of an optimizer step, computed from the published TGS; NaN without one."""
        return self.step_tokens / (self.row.tgs or float("nan"))


def case_of(row: Measurement, spans_nodes: bool) -> Case:
    """Return the case of a row.

    Raises:
        ValueError: The model, GPU or settings of the row are unknown.
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
    """Select only the predicted row itself, so that the fit leaves out one row."""
    return case is other


def alike(field: str) -> Same:
    """Return a predicate for rows of the same page with the same value of a field."""
    return lambda case, other: (
        case.row.source == other.row.source and case.row.text(field) == other.row.text(field)
    )


def memory_constants(case: Case, cases: Sequence[Case], same: Same = itself) -> MemoryParams:
    """Return the memory parameters of a case's stack, fitted to the cases that `same` does not exclude."""
    rows = [each for each in cases if each.row.memory_gib and not same(case, each)]
    # First the page, then the stack with the page's parameters as its prior.
    page = fit_memory([_measured(each) for each in rows if _related(each, case)])
    own = [_measured(each) for each in rows if each.row.stack == case.row.stack]
    return fit_memory(own, page, _WITHIN_A_PAGE)


def time_constants(case: Case, cases: Sequence[Case], same: Same = itself) -> TimeParams:
    """Return the time parameters of a case's stack, fitted to the cases that `same` does not exclude."""
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
