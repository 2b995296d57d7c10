"""Searches all valid parallel configurations of a job on a cluster, and predicts and ranks them.

A candidate is a valid job, so its settings can be copied into the job file. Fields that change the training
result (model, method, data, global batch size, optimizer) are not searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.auto_values import DeviceType
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import broken_rules
from orchestrator.errors import SpecError
from orchestrator.parallel.parallel_dims import sequence_parallel_degrees
from orchestrator.planner.estimate import CalibrationParams, predict, workload_from_job
from orchestrator.planner.plan import Candidate, Plan, Suggestion
from orchestrator.planner.workload import UNKNOWN_DATA, DataShape, Model

TIE = 0.03
"""Candidates within this fraction of the fastest count as equally fast; the one with the least cost wins."""
TILE_TOKENS = 8192
"""loss_tile_tokens of candidates whose logits do not fit at once."""
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
"""(zero_stage, offload_optimizer, offload_param) combinations to search."""


def predict_job(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    calibration: CalibrationParams = CalibrationParams(),
    data: DataShape = UNKNOWN_DATA,
) -> Candidate:
    """Predict memory and step time of a job as written.

    Args:
        job: The job.
        config: The model's config.json.
        cluster: The nodes and devices.
        calibration: Calibration of the software stack.
        data: Statistics of the data.

    Raises:
        SpecError: The model architecture is not supported.
    """
    return _Search(job, config, cluster, calibration, data).candidate(job)


def search(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    calibration: CalibrationParams = CalibrationParams(),
    data: DataShape = UNKNOWN_DATA,
) -> Plan:
    """Search the fastest configuration of a job on a cluster.

    Args:
        job: The job.
        config: The model's config.json.
        cluster: The nodes and devices.
        calibration: Calibration of the software stack.
        data: Statistics of the data.

    Raises:
        SpecError: The model architecture is not supported.
    """
    space = _Search(job, config, cluster, calibration, data)
    candidates = list(space.candidates())
    fitting = [candidate for candidate in candidates if candidate.prediction.verdict == "fits"]
    # Without a candidate that fits with headroom, accept one without.
    usable = fitting or [candidate for candidate in candidates if candidate.prediction.verdict == "tight"]
    best = preferred(usable)
    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(_state_and_sequence_key(candidate.job), []).append(candidate)
    best_key = _state_and_sequence_key(best.job) if best else None
    others = [_best_of(group) for key, group in groups.items() if key != best_key]
    others.sort(
        key=lambda candidate: (
            _order(candidate),
            candidate.seconds_per_pack,
            candidate.prediction.needed_bytes,
        )
    )
    return Plan(cluster, space.candidate(job), best, tuple(others), len(candidates))


def suggest_changes(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    calibration: CalibrationParams,
    data: DataShape = UNKNOWN_DATA,
    count: int = 3,
) -> list[Suggestion]:
    """Return changes that make a job fit, sorted by number of changes and then by speed.

    If parallel settings alone give fewer than `count` suggestions, more nodes, a shorter max_length and LoRA
    are suggested as well.

    Args:
        job: The job.
        config: The model's config.json.
        cluster: The nodes and devices.
        calibration: Calibration of the software stack.
        data: Statistics of the data.
        count: Maximum number of suggestions.
    """
    space = _Search(job, config, cluster, calibration, data)
    asked = space.candidate(job)
    fitting = [
        candidate for candidate in space.candidates() if candidate.prediction.verdict != "does not fit"
    ]
    changed = [(asked.changes_to(candidate), candidate) for candidate in fitting]
    changed.sort(
        key=lambda pair: (len(pair[0]), pair[1].prediction.verdict != "fits", pair[1].seconds_per_pack)
    )
    suggestions: list[Suggestion] = []
    for changes, candidate in changed:
        if not any(set(earlier.changes) <= set(changes) for earlier in suggestions):
            suggestions.append(Suggestion(changes, candidate))
    suggestions += (
        [] if len(suggestions) >= count else _suggest_other_jobs(job, config, cluster, calibration, data)
    )
    return suggestions[:count]


def _suggest_other_jobs(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    calibration: CalibrationParams,
    data: DataShape,
) -> Iterator[Suggestion]:
    """Yield suggestions that need more nodes or change the training result."""
    for factor in (2, 4, 8, 16, 32, 64):
        larger = replace(cluster, nodes=cluster.nodes * factor)
        best = search(job, config, larger, calibration, data).best
        if best and best.job.parallel.workers > cluster.gpus:
            asked = _Search(job, config, cluster, calibration, data).candidate(job)
            yield Suggestion({"--gpus": str(larger), **asked.changes_to(best)}, best)
            break
    if job.parallel.workers > cluster.gpus:
        return  # no other change helps: the cluster is too small for the workers of the job
    length = job.data.max_length // 2
    while length >= 512:
        shorter = job.model_copy(update={"data": job.data.model_copy(update={"max_length": length})})
        candidate = _Search(shorter, config, cluster, calibration, data).candidate(shorter)
        if candidate.prediction.verdict == "fits":
            yield Suggestion({"data.max_length": length}, candidate)
            break
        length //= 2
    for kind, bits in (("lora", "none"), ("lora", "nf4")):
        method = job.method.model_copy(update={"type": kind, "quantization": bits})
        adapted = job.model_copy(update={"method": method})
        if (job.method.type == kind and job.method.quantization == bits) or any(
            True for _ in broken_rules(adapted)
        ):
            continue
        candidate = _Search(adapted, config, cluster, calibration, data).candidate(adapted)
        if candidate.prediction.verdict == "fits":
            changes = {"method.type": kind} | ({} if bits == "none" else {"method.quantization": bits})
            yield Suggestion(changes, candidate)


def preferred(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the fastest candidate; among equally fast ones (`TIE`), that with the least cost.

    Cost is compared by workers, then offloading, sequence parallel size, recomputation and memory.

    Args:
        candidates: Candidates that fit.
    """
    listed = list(candidates)
    if not listed:
        return None
    fastest = min(candidate.seconds_per_pack for candidate in listed)
    near = [candidate for candidate in listed if candidate.seconds_per_pack <= fastest * (1 + TIE)]
    return min(near or listed, key=_cost)


class _Search:
    """Enumerates the candidates of a job on a cluster."""

    def __init__(
        self,
        job: JobSpec,
        config: Mapping[str, object],
        cluster: ClusterSpec,
        calibration: CalibrationParams,
        data: DataShape,
    ) -> None:
        model = Model.from_config(config)
        if model is None:
            raise SpecError(
                f"model.path={job.model.path} has the architecture {config.get('model_type')!r}, which the "
                "planner does not support; train it without a plan"
            )
        self._job, self._config, self._model = job, config, model
        self._cluster, self._calibration, self._data = cluster, calibration, data
        self._device: DeviceType = "cpu" if cluster.device.is_cpu else "cuda"

    def candidate(self, job: JobSpec) -> Candidate:
        """Predict a job."""
        per_node = min(self._cluster.gpus_per_node, job.parallel.workers)
        work = workload_from_job(job, self._config, self._model, per_node, self._device)
        work = work.with_data(self._data, job.data.cross_document_attention)
        return Candidate(job, predict(work, self._cluster, self._calibration))

    def candidates(self) -> Iterator[Candidate]:
        """Yield valid candidates, except those that need more memory than one that does not fit."""
        for workers, size in self._layouts():
            rows_per_step = self._job.optim.global_batch_size * size // workers
            for stage, optimizer, param in _STATES:
                if workers == 1 and stage in (1, 2) and optimizer == "none":
                    continue  # one worker has nothing to partition
                where = {"offload_optimizer": optimizer, "offload_param": param, "zero_stage": stage}
                parallel = {"workers": workers, "sequence_parallel_size": size, **where}
                yield from self._batch_and_checkpointing(parallel, rows_per_step)

    def _layouts(self) -> Iterator[tuple[int, int]]:
        """Yield (workers, sequence_parallel_size) pairs that divide the global batch size."""
        shape, packs = self._model.shape, self._job.optim.global_batch_size
        degrees = sequence_parallel_degrees(shape.heads, shape.kv_heads)
        for workers, size in product(_worlds(self._cluster), degrees):
            if workers % size == 0 and packs % (workers // size) == 0:
                yield workers, size

    def _batch_and_checkpointing(
        self, parallel: Mapping[str, object], rows_per_step: int
    ) -> Iterator[Candidate]:
        """Yield candidates with decreasing recomputation and increasing micro-batch size."""
        rest = {"offload_activations": "none", "offload_path": None}
        for kept in ("full", "selective", "none"):
            for rows in (rows for rows in (1, 2, 4, 8, 16) if rows_per_step % rows == 0):
                model = {"gradient_checkpointing": kept}
                job = _with(self._job, {**parallel, **rest}, model, {"micro_batch_size": rows})
                if any(True for _ in broken_rules(job)):
                    break
                candidate = self.candidate(job)
                yield candidate
                if candidate.prediction.verdict != "fits":
                    yield from map(self.candidate, self._smaller(job))
                if candidate.prediction.verdict == "does not fit":
                    if rows == 1:
                        return
                    break

    def _smaller(self, job: JobSpec) -> Iterator[JobSpec]:
        """Yield variants with less memory and the same result: tiled loss, offloaded activations."""
        tiled = None if job.model.loss_tile_tokens else _with(job, {}, {"loss_tile_tokens": TILE_TOKENS}, {})
        if tiled and job.data.max_length * job.optim.micro_batch_size > TILE_TOKENS:
            yield tiled
        if job.model.gradient_checkpointing == "full":
            for variant in (job, tiled):
                if variant is not None:
                    moved = _with(variant, {"offload_activations": "cpu"}, {}, {})
                    if not any(True for _ in broken_rules(moved)):
                        yield moved


def _with(
    job: JobSpec, parallel: Mapping[str, object], model: Mapping[str, object], optim: Mapping[str, object]
) -> JobSpec:
    return job.model_copy(
        update={
            "parallel": job.parallel.model_copy(update=parallel),
            "model": job.model.model_copy(update=model),
            "optim": job.optim.model_copy(update=optim),
        }
    )


def _worlds(cluster: ClusterSpec) -> list[int]:
    """Return worker counts: whole nodes (divisors, powers of two) and fractions of a node."""
    nodes, gpus = cluster.nodes, cluster.gpus_per_node
    whole = {n for n in range(1, nodes + 1) if nodes % n == 0 or n & (n - 1) == 0}
    parts = {n for n in range(1, gpus + 1) if gpus % n == 0}
    return sorted({n * gpus for n in whole} | parts, reverse=True)


def _state_and_sequence_key(job: JobSpec) -> tuple[object, ...]:
    parallel = job.parallel
    states = (parallel.zero_stage, parallel.offload_optimizer, parallel.offload_param)
    return (*states, parallel.sequence_parallel_size)


def _order(candidate: Candidate) -> int:
    return ("fits", "tight", "does not fit").index(candidate.prediction.verdict)


def _best_of(group: list[Candidate]) -> Candidate:
    """Return the preferred candidate that fits, or else the one that needs the least memory."""
    usable = [candidate for candidate in group if candidate.prediction.verdict == "fits"]
    usable = usable or [candidate for candidate in group if candidate.prediction.verdict == "tight"]
    return preferred(usable) or min(group, key=lambda candidate: candidate.prediction.needed_bytes)


def _cost(candidate: Candidate) -> tuple[float, ...]:
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
