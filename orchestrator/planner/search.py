"""The search: every way to spread a job over machines that the rules allow, predicted and ranked.

A candidate is a job. So a plan can be written into the job file as it stands, and what the rules of a job
refuse is never proposed. What decides what is learnt (model, method, data, batch, optimizer) is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import broken_rules
from orchestrator.errors import SpecError
from orchestrator.parallel.parallel_dims import sequence_parallel_degrees
from orchestrator.planner.estimate import CalibrationParams, Prediction, predict, workload_from_job
from orchestrator.planner.workload import UNKNOWN_DATA, DataShape, Model

TIE = 0.03
"""Predictions that are this close are not told apart: the plan that asks for less is preferred."""
TILE_TOKENS = 8192
"""Labels that are scored at a time where all at once do not fit."""
_STATES = (
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (1, "cpu", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
)
"""Stage, place of the optimizer's state, place of the parameters."""
FIELDS = (
    "parallel.workers",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "parallel.offload_param",
    "parallel.sequence_parallel_size",
    "optim.micro_batch_size",
    "model.gradient_checkpointing",
    "model.loss_tile_tokens",
    "parallel.offload_activations",
)
"""Fields of a job that a plan may change."""


@dataclass(frozen=True)
class Candidate:
    """A job and what it needs and takes.

    Attributes:
        job: The job.
        prediction: What it needs and takes.
    """

    job: JobSpec
    prediction: Prediction

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that a plan decides, by their dotted names."""
        return {name: _value(self.job, name) for name in FIELDS}

    @property
    def seconds_per_pack(self) -> float:
        """Seconds of a step over its packs: how long training takes, whatever the step."""
        seconds = self.prediction.seconds
        return float("inf") if seconds is None else seconds / self.job.optim.global_batch_size

    def changes_to(self, other: Candidate) -> dict[str, Any]:
        """Return the settings of another candidate that differ from this one's."""
        mine = self.settings
        return {name: value for name, value in other.settings.items() if value != mine[name]}


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a job fit.

    Attributes:
        changes: New values by field; `--gpus` are machines.
        candidate: The job with them.
    """

    changes: Mapping[str, Any]
    candidate: Candidate


@dataclass(frozen=True)
class Plan:
    """What the search found.

    Attributes:
        cluster: What was planned for.
        asked: The job as it is written, on as many workers as it says.
        best: The candidate to take; None where nothing fits.
        others: The best candidate of every other way to place states and share sequences, fitting ones first.
        considered: How many candidates were predicted.
    """

    cluster: ClusterSpec
    asked: Candidate
    best: Candidate | None
    others: tuple[Candidate, ...]
    considered: int


def predict_job(
    job: JobSpec,
    config: Mapping[str, Any],
    cluster: ClusterSpec,
    calibration: CalibrationParams = CalibrationParams(),
    data: DataShape = UNKNOWN_DATA,
) -> Candidate:
    """Return the prediction of a job as it is written.

    Args:
        job: The job.
        config: Its model's config.json.
        cluster: What it runs on.
        calibration: What is known of the stack.
        data: What is known of the data.

    Raises:
        SpecError: The model is of a family whose sizes are not known.
    """
    return _Search(job, config, cluster, calibration, data).candidate(job)


def search(
    job: JobSpec,
    config: Mapping[str, Any],
    cluster: ClusterSpec,
    calibration: CalibrationParams = CalibrationParams(),
    data: DataShape = UNKNOWN_DATA,
) -> Plan:
    """Return the fastest way to train a job on a cluster, and the ways that lose.

    Args:
        job: The job.
        config: Its model's config.json.
        cluster: What there is.
        calibration: What is known of the stack.
        data: What is known of the data.

    Raises:
        SpecError: The model is of a family whose sizes are not known.
    """
    space = _Search(job, config, cluster, calibration, data)
    found = list(space.candidates())
    fitting = [each for each in found if each.prediction.verdict == "fits"]
    # What has no margin is better than nothing.
    usable = fitting or [each for each in found if each.prediction.verdict == "tight"]
    best = preferred(usable)
    ways: dict[tuple[Any, ...], list[Candidate]] = {}
    for each in found:
        ways.setdefault(_way(each.job), []).append(each)
    best_way = _way(best.job) if best else None
    others = [_best_of(group) for way, group in ways.items() if way != best_way]
    others.sort(key=lambda each: (_order(each), each.seconds_per_pack, each.prediction.needed_bytes))
    return Plan(cluster, space.candidate(job), best, tuple(others), len(found))


def suggest_changes(
    job: JobSpec,
    config: Mapping[str, Any],
    cluster: ClusterSpec,
    calibration: CalibrationParams,
    data: DataShape = UNKNOWN_DATA,
    count: int = 3,
) -> list[Suggestion]:
    """Return what would make a job fit, least changes first, and of equally many the fastest.

    Where spreading it otherwise does not give as many ways, more nodes, shorter packs and adapters follow.

    Args:
        job: The job.
        config: Its model's config.json.
        cluster: What it was to run on.
        calibration: What is known of the stack.
        data: What is known of the data.
        count: How many.
    """
    space = _Search(job, config, cluster, calibration, data)
    asked = space.candidate(job)
    fitting = [each for each in space.candidates() if each.prediction.verdict != "does not fit"]
    changed = [(asked.changes_to(each), each) for each in fitting]
    changed.sort(
        key=lambda pair: (len(pair[0]), pair[1].prediction.verdict != "fits", pair[1].seconds_per_pack)
    )
    found: list[Suggestion] = []
    for changes, each in changed:
        if not any(set(earlier.changes) <= set(changes) for earlier in found):
            found.append(Suggestion(changes, each))
    found += [] if len(found) >= count else _suggest_other_jobs(job, config, cluster, calibration, data)
    return found[:count]


def _suggest_other_jobs(
    job: JobSpec,
    config: Mapping[str, Any],
    cluster: ClusterSpec,
    calibration: CalibrationParams,
    data: DataShape,
) -> Iterator[Suggestion]:
    """Yield what asks for another cluster, or changes what is learnt."""
    for factor in (2, 4, 8, 16, 32, 64):
        larger = replace(cluster, nodes=cluster.nodes * factor)
        best = search(job, config, larger, calibration, data).best
        if best and best.job.parallel.workers > cluster.gpus:
            asked = _Search(job, config, cluster, calibration, data).candidate(job)
            yield Suggestion({"--gpus": str(larger), **asked.changes_to(best)}, best)
            break
    if job.parallel.workers > cluster.gpus:
        return  # whatever is learnt
    length = job.data.max_length // 2
    while length >= 512:
        shorter = job.model_copy(update={"data": job.data.model_copy(update={"max_length": length})})
        found = _Search(shorter, config, cluster, calibration, data).candidate(shorter)
        if found.prediction.verdict == "fits":
            yield Suggestion({"data.max_length": length}, found)
            break
        length //= 2
    for kind, bits in (("lora", "none"), ("lora", "nf4")):
        method = job.method.model_copy(update={"type": kind, "quantization": bits})
        adapted = job.model_copy(update={"method": method})
        if (job.method.type == kind and job.method.quantization == bits) or any(
            True for _ in broken_rules(adapted)
        ):
            continue
        found = _Search(adapted, config, cluster, calibration, data).candidate(adapted)
        if found.prediction.verdict == "fits":
            changes = {"method.type": kind} | ({} if bits == "none" else {"method.quantization": bits})
            yield Suggestion(changes, found)


def preferred(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the fastest; of those that are as fast as predictions tell, the one that asks for least.

    That is the fewest workers, then the least that is moved to hosts, recomputed and shared, then the most
    memory to spare.

    Args:
        candidates: Candidates that fit.
    """
    listed = list(candidates)
    if not listed:
        return None
    fastest = min(each.seconds_per_pack for each in listed)
    near = [each for each in listed if each.seconds_per_pack <= fastest * (1 + TIE)]
    return min(near or listed, key=_effort)


class _Search:
    """The candidates of a job on machines."""

    def __init__(
        self,
        job: JobSpec,
        config: Mapping[str, Any],
        cluster: ClusterSpec,
        calibration: CalibrationParams,
        data: DataShape,
    ) -> None:
        model = Model.from_config(config)
        if model is None:
            raise SpecError(
                f"model.path={job.model.path} is of the family {config.get('model_type')!r}, whose sizes are "
                "not known here, so it cannot be planned; train it with --force, which plans nothing"
            )
        self._job, self._config, self._model = job, config, model
        self._cluster, self._calibration, self._data = cluster, calibration, data
        self._device: Any = "cpu" if cluster.device.is_cpu else "cuda"

    def candidate(self, job: JobSpec) -> Candidate:
        """Return a job with its prediction."""
        per_node = min(self._cluster.gpus_per_node, job.parallel.workers)
        work = workload_from_job(job, self._config, self._model, per_node, self._device)
        work = work.over(self._data, job.data.cross_document_attention)
        return Candidate(job, predict(work, self._cluster, self._calibration))

    def candidates(self) -> Iterator[Candidate]:
        """Yield what the rules allow, but for what needs more than something that does not fit already."""
        for workers, size in self._layouts():
            for stage, optimizer, param in _STATES:
                if workers == 1 and stage in (1, 2) and optimizer == "none":
                    continue  # nothing to share it with
                where = {"offload_optimizer": optimizer, "offload_param": param, "zero_stage": stage}
                yield from self._spread({"workers": workers, "sequence_parallel_size": size, **where})

    def _layouts(self) -> Iterator[tuple[int, int]]:
        """Yield numbers of workers, and of those that share a row, that can be dealt a step's packs."""
        shape, packs = self._model.shape, self._job.optim.global_batch_size
        degrees = sequence_parallel_degrees(shape.heads, shape.kv_heads)
        for workers, size in product(_worlds(self._cluster), degrees):
            if workers % size == 0 and packs % (workers // size) == 0:
                yield workers, size

    def _spread(self, parallel: Mapping[str, Any]) -> Iterator[Candidate]:
        """Yield a layout with more and more kept for the backward pass, and more and more rows at a time."""
        each = self._job.optim.global_batch_size * parallel["sequence_parallel_size"] // parallel["workers"]
        rest = {"offload_activations": "none", "offload_path": None}
        for kept in ("full", "selective", "none"):
            for rows in (rows for rows in (1, 2, 4, 8, 16) if each % rows == 0):
                model = {"gradient_checkpointing": kept}
                job = _with(self._job, {**parallel, **rest}, model, {"micro_batch_size": rows})
                if any(True for _ in broken_rules(job)):
                    break
                found = self.candidate(job)
                yield found
                if found.prediction.verdict != "fits":
                    yield from map(self.candidate, self._smaller(job))
                if found.prediction.verdict == "does not fit":
                    if rows == 1:
                        return
                    break

    def _smaller(self, job: JobSpec) -> Iterator[JobSpec]:
        """Yield what holds less at a time and computes the same, at some cost."""
        tiled = None if job.model.loss_tile_tokens else _with(job, {}, {"loss_tile_tokens": TILE_TOKENS}, {})
        if tiled and job.data.max_length * job.optim.micro_batch_size > TILE_TOKENS:
            yield tiled
        if job.model.gradient_checkpointing == "full":
            for each in (job, tiled):
                if each is not None:
                    moved = _with(each, {"offload_activations": "cpu"}, {}, {})
                    if not any(True for _ in broken_rules(moved)):
                        yield moved


def _with(
    job: JobSpec, parallel: Mapping[str, Any], model: Mapping[str, Any], optim: Mapping[str, Any]
) -> JobSpec:
    return job.model_copy(
        update={
            "parallel": job.parallel.model_copy(update=parallel),
            "model": job.model.model_copy(update=model),
            "optim": job.optim.model_copy(update=optim),
        }
    )


def _worlds(cluster: ClusterSpec) -> list[int]:
    """Return numbers of workers: all, whole nodes that divide them or are powers of two, and parts of one."""
    nodes, each = cluster.nodes, cluster.gpus_per_node
    whole = {n for n in range(1, nodes + 1) if nodes % n == 0 or n & (n - 1) == 0}
    parts = {n for n in range(1, each + 1) if each % n == 0}
    return sorted({n * each for n in whole} | parts, reverse=True)


def _way(job: JobSpec) -> tuple[Any, ...]:
    parallel = job.parallel
    states = (parallel.zero_stage, parallel.offload_optimizer, parallel.offload_param)
    return (*states, parallel.sequence_parallel_size)


def _order(candidate: Candidate) -> int:
    return ("fits", "tight", "does not fit").index(candidate.prediction.verdict)


def _best_of(group: list[Candidate]) -> Candidate:
    """Return the candidate of a group that stands for it: the fastest that fits, or the nearest to it."""
    usable = [each for each in group if each.prediction.verdict == "fits"]
    usable = usable or [each for each in group if each.prediction.verdict == "tight"]
    return preferred(usable) or min(group, key=lambda each: each.prediction.needed_bytes)


def _effort(candidate: Candidate) -> tuple[float, ...]:
    parallel, work = candidate.job.parallel, candidate.prediction.work
    moved = (work.offload_optimizer, work.offload_param, work.offload_activations)
    return (
        parallel.workers,
        sum(moved),
        parallel.sequence_parallel_size,
        {"none": 0, "selective": 1, "full": 2}[work.checkpointing],
        work.loss_tile_tokens > 0,
        candidate.prediction.needed_bytes,
    )


def _value(job: JobSpec, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return getattr(getattr(job, section), name)
