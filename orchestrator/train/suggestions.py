"""Suggests job settings that reduce memory use after an out-of-memory error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from orchestrator.config.schema import JobSpec

_MAX_SUGGESTIONS = 4


def memory_suggestions(job: JobSpec, device: Literal["cuda", "cpu"]) -> str:
    """Return settings that reduce the memory of a worker, those with the least slowdown first.

    Args:
        job: The job that ran out of memory.
        device: Device type; on CPU, offloading to host memory frees nothing.

    Returns:
        A clause such as "use zero_stage: 3, or lower data.max_length".
    """
    changes = [*_of_activations(job, device), *_of_model_states(job, device)][:_MAX_SUGGESTIONS]
    return _either([*changes, "lower data.max_length"])


def node_memory_suggestions(job: JobSpec, device: Literal["cuda", "cpu"]) -> str:
    """Return settings that reduce the host memory used on a node.

    Args:
        job: The job that ran out of memory.
        device: Device type; on CPU, workers use host memory only.
    """
    parallel = job.parallel
    changes = ["place fewer workers on a node", "use nodes with more memory"]
    offloaded = [
        f"parallel.{name}: none"
        for name in ("offload_optimizer", "offload_param", "offload_activations")
        if getattr(parallel, name) == "cpu"
    ]
    if device == "cpu":
        return f"{', '.join(changes)}, {memory_suggestions(job, device)}"
    return _either([*changes, *([f"set {' and '.join(offloaded)}"] if offloaded else [])])


def _either(changes: Sequence[str]) -> str:
    return ", or ".join(filter(None, [", ".join(changes[:-1]), changes[-1]]))


def _of_activations(job: JobSpec, device: Literal["cuda", "cpu"]) -> Iterator[str]:
    model, parallel, optim = job.model, job.parallel, job.optim
    if optim.micro_batch_size > 1:
        yield f"lower optim.micro_batch_size={optim.micro_batch_size}"
    if model.gradient_checkpointing != "full":
        yield "use model.gradient_checkpointing: full"
    if model.loss_tile_tokens is None:
        yield "set model.loss_tile_tokens: 4096"
    if parallel.workers > parallel.sequence_parallel_size:
        yield f"raise parallel.sequence_parallel_size={parallel.sequence_parallel_size}"
    if device == "cuda" and model.gradient_checkpointing == "full" and parallel.offload_activations == "none":
        yield "use parallel.offload_activations: cpu"


def _of_model_states(job: JobSpec, device: Literal["cuda", "cpu"]) -> Iterator[str]:
    parallel = job.parallel
    if parallel.zero_stage < 3 and parallel.workers > 1:
        yield "use parallel.zero_stage: 3"
    if device == "cpu":
        return
    if parallel.offload_optimizer == "none" and parallel.zero_stage > 0 and job.optim.optimizer == "adamw":
        yield "use parallel.offload_optimizer: cpu"
    elif (
        parallel.offload_param == "none" and parallel.offload_optimizer == "cpu" and parallel.zero_stage == 3
    ):
        yield "use parallel.offload_param: cpu"
