"""A job with every `auto` decided for one cluster, once; the driver hands it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from orchestrator.arch.parameters import ParameterCount
from orchestrator.cluster.placement import placement_problem
from orchestrator.cluster.topology import Node
from orchestrator.config.auto_values import DeviceType, TrainDtype, resolve_device, resolve_dtype
from orchestrator.config.schema import JobSpec
from orchestrator.engine.optimizers import require_bitsandbytes
from orchestrator.errors import ClusterError, SpecError
from orchestrator.model.build import load_config, require_supported
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig, render, size_nvme_buffers
from orchestrator.parallel.parallel_dims import sequence_parallel_problem
from orchestrator.planner.host_memory import HostMemory, disk_bytes, host_memory

_GIB = 2**30


@dataclass(frozen=True)
class ResolvedJob:
    """A job and what follows from it on one cluster.

    Attributes:
        job: The job, with absolute paths.
        device: Device type of all workers.
        dtype: Dtype of weights and activations.
        model_config: The model's configuration, with its resized vocabulary where it has one.
        parameter_count: Parameters of the model with its adapters; None if only the workers can count them.
        deepspeed_config: The rendered DeepSpeed configuration.
        host_memory: Host memory that each worker reserves for offloaded state; None if nothing is offloaded
            or the parameters cannot be counted.
        nvme_bytes: Bytes that each worker writes at most to its node's disk; 0 without offload to nvme.
    """

    job: JobSpec
    device: DeviceType
    dtype: TrainDtype
    model_config: PretrainedConfig
    parameter_count: ParameterCount | None
    deepspeed_config: DeepSpeedConfig
    host_memory: HostMemory | None
    nvme_bytes: int

    @property
    def gpus_per_worker(self) -> int:
        """1 on CUDA, 0 on CPU."""
        return 1 if self.device == "cuda" else 0

    @property
    def worker_resources(self) -> dict[str, float]:
        """Resources that Ray reserves for each worker: CPU, GPU, and memory in bytes."""
        resources: dict[str, float] = {"CPU": self.job.parallel.cpus_per_worker}
        if self.gpus_per_worker:
            resources["GPU"] = self.gpus_per_worker
        if self.host_memory is not None:
            resources["memory"] = self.host_memory.total
        return resources


def resolve(job: JobSpec, nodes: Sequence[Node], reads_weights: bool = True) -> ResolvedJob:
    """Decide everything that a job leaves to the cluster and the model, and refuse what cannot run.

    Args:
        job: The job, with absolute paths.
        nodes: The live nodes of the cluster.
        reads_weights: False if a checkpoint replaces every weight, so that weight files may be missing.

    Raises:
        SpecError: The model, dtype, optimizer or parallelism of the job is not supported.
        ClusterError: The nodes cannot hold the worker group.
    """
    device = resolve_device(job.parallel.device, any(node.gpus for node in nodes))
    require_worker_slots(job, device, nodes)
    dtype = resolve_dtype(job.model.dtype, device)
    require_bitsandbytes(job.optim.optimizer)
    config = load_config(job.model)
    count = require_supported(job, reads_weights, config)
    _require_divisible_heads(job, config.get_text_config())
    deepspeed_config = render(job, dtype, device)
    if count is not None:
        size_nvme_buffers(deepspeed_config, -(-count.largest // job.parallel.workers))
    memory = _offloaded_memory(job, deepspeed_config, count)
    if memory is not None and count is not None:
        _require_host_memory(job, device, nodes, memory, count)
    return ResolvedJob(
        job=job,
        device=device,
        dtype=dtype,
        model_config=config,
        parameter_count=count,
        deepspeed_config=deepspeed_config,
        host_memory=memory,
        nvme_bytes=disk_bytes(deepspeed_config, count, job.parallel.workers) if count is not None else 0,
    )


def require_worker_slots(
    job: JobSpec, device: DeviceType, nodes: Sequence[Node], memory_bytes: int = 0
) -> None:
    """Refuse a worker group that the nodes cannot hold even when they are idle.

    Raises:
        ClusterError: The request, and what each node has.
    """
    parallel = job.parallel
    gpus = 1 if device == "cuda" else 0
    problem = placement_problem(tuple(nodes), parallel.workers, parallel.cpus_per_worker, gpus, memory_bytes)
    if problem:
        raise ClusterError(problem)


def offload_reason(job: JobSpec, count: ParameterCount, memory: HostMemory) -> str:
    """Return what host memory is reserved for, with the parameter counts and the size of each part."""
    parts = f"optimizer {format_gib(memory.optimizer)}, parameters {format_gib(memory.parameters)}"
    parts += f", the model while it is built {format_gib(memory.building)}" if memory.building else ""
    return (
        f"{count.total:,} parameters, {count.trained:,} of them trained, offloaded by "
        f"{job.parallel.workers} workers ({parts} each, plus 50 % for buffers)"
    )


def format_gib(size_bytes: float) -> str:
    """Return a number of bytes in GiB."""
    return f"{size_bytes / _GIB:.4g} GiB"


def _offloaded_memory(
    job: JobSpec, deepspeed_config: DeepSpeedConfig, count: ParameterCount | None
) -> HostMemory | None:
    parallel = job.parallel
    if count is None or parallel.offload_optimizer == parallel.offload_param == "none":
        return None
    return host_memory(deepspeed_config, count, parallel.workers)


def _require_host_memory(
    job: JobSpec, device: DeviceType, nodes: Sequence[Node], memory: HostMemory, count: ParameterCount
) -> None:
    try:
        require_worker_slots(job, device, nodes, memory.total)
    except ClusterError as error:
        raise ClusterError(
            f"{'; '.join(error.problems)}; the memory is for {offload_reason(job, count, memory)}; raise "
            "parallel.workers so that each holds less, or train fewer parameters with method.type: lora"
        ) from None


def _require_divisible_heads(job: JobSpec, config: PretrainedConfig) -> None:
    """Refuse a sequence_parallel_size that the attention heads do not allow."""
    size = job.parallel.sequence_parallel_size
    if size == 1:
        return
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if problem := sequence_parallel_problem(size, heads, kv_heads):
        raise SpecError(problem)
