"""What a job needs and takes on a given cluster, with how far that may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.auto_values import resolve_dtype
from orchestrator.config.schema import JobSpec
from orchestrator.parallel.deepspeed_config import render, size_nvme_buffers
from orchestrator.planner.calibration import MARGIN, MemoryParams, Verdict, verdict
from orchestrator.planner.host_memory import HostMemory, Offload
from orchestrator.planner.memory import GIB, GpuMemory, gpu_memory, host_memory_of_workload
from orchestrator.planner.step_time import (
    MissingDeviceRates,
    StepTime,
    TimeParams,
    dtype_of,
    micro_batch_model_flops,
    step_time,
    tokens_per_gpu_second,
)
from orchestrator.planner.workload import Model, Workload

MEMORY_RANGE = {True: 0.10, False: 0.25}
"""Share of the predicted peak by which nine in ten published rows may be off, calibrated and not; rounded up
from what `tests.benchmarks.planner` prints."""
TIME_RANGE = {True: 0.20, False: 0.35}
"""The same for seconds."""
PROCESS_BYTES = 0.67 * GIB
"""Of a worker on a CPU, libraries included, before it holds anything: what is left of the twelve jobs of
tests/benchmarks/toy_jobs.yaml when the parts are taken off."""
MARGINS = {True: MARGIN, False: 0.15}
"""Part of the need that has to be spare; more where no step of the stack was measured."""
_OPTIMIZER_BYTES = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
"""Two moments of a byte each; other optimizers are counted as Adam in fp32, and Muon needs less."""


@dataclass(frozen=True)
class CalibrationParams:
    """What is known of this stack, beside formulas.

    Attributes:
        memory: Its memory.
        time: Its time.
        calibrated: Whether they were fitted to steps that it made.
    """

    memory: MemoryParams = field(default_factory=MemoryParams)
    time: TimeParams = field(default_factory=TimeParams)
    calibrated: bool = False


@dataclass(frozen=True)
class Prediction:
    """Memory and seconds of a step.

    Attributes:
        work: What is done.
        memory: Bytes on a GPU by part.
        peak_bytes: What a GPU's allocator holds at the peak.
        needed_bytes: What has to fit.
        capacity_bytes: What a GPU has.
        offloaded_bytes: Of the peak, what is offloaded, where host and device have one memory.
        unallocated_bytes: Of the peak, what torch's allocator does not see: CUDA's own.
        host: Bytes of a worker in its node's memory.
        host_bytes_per_node: Of all workers of a node.
        host_capacity_bytes: What a node has; None where that is not known.
        time: Seconds of a step by part; None where the catalogue lacks the device's rates, and on processors
            until a run there has calibrated them.
        peak_flops: Dense peak of the device; None where the catalogue has none, and on processors.
        calibrated: Whether constants of this stack were used.
    """

    work: Workload
    memory: GpuMemory
    peak_bytes: float
    needed_bytes: float
    capacity_bytes: float
    offloaded_bytes: float
    unallocated_bytes: float
    host: HostMemory
    host_bytes_per_node: float
    host_capacity_bytes: float | None
    time: StepTime | None
    peak_flops: float | None
    calibrated: bool

    @property
    def verdict(self) -> Verdict:
        """Whether it fits on the GPU and in the node's memory; the worse of both."""
        if self.host_capacity_bytes is not None and self.host_bytes_per_node > self.host_capacity_bytes:
            return "does not fit"
        return verdict(self.needed_bytes, self.capacity_bytes, MARGINS[self.calibrated])

    @property
    def seconds(self) -> float | None:
        """Of an optimizer step."""
        return None if self.time is None else self.time.total

    @property
    def tgs(self) -> float | None:
        """Tokens a GPU and second, if packs are full."""
        return None if self.time is None else tokens_per_gpu_second(self.work, self.time.total)

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of a GPU by the canon of `orchestrator.arch.flops`: the work asked for."""
        if self.time is None:
            return None
        return (
            self.work.gradient_accumulation_steps
            * micro_batch_model_flops(self.work)
            / self.time.total
            / 1e12
        )

    @property
    def mfu(self) -> float | None:
        """The same over the device's dense peak."""
        return None if self.tflops is None or not self.peak_flops else self.tflops * 1e12 / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the range of each figure."""
        off, slow = MEMORY_RANGE[self.calibrated], TIME_RANGE[self.calibrated]
        return {
            "verdict": self.verdict,
            "memory_peak_bytes": round(self.peak_bytes),
            "memory_peak_bytes_range": [
                round(self.peak_bytes * (1 - off)),
                round(self.peak_bytes * (1 + off)),
            ],
            "memory_reserved_peak_bytes": round(self.peak_bytes - self.unallocated_bytes),
            "memory_needed_bytes": round(self.needed_bytes),
            "memory_capacity_bytes": round(self.capacity_bytes),
            "memory_bytes_by_part": {name: round(size) for name, size in self.memory.by_part().items()},
            "host_memory_bytes_per_node": round(self.host_bytes_per_node),
            "host_memory_capacity_bytes": self.host_capacity_bytes and round(self.host_capacity_bytes),
            "step_seconds": self.seconds,
            "step_seconds_range": self.seconds and [self.seconds * (1 - slow), self.seconds * (1 + slow)],
            "step_seconds_by_part": self.time and self.time.by_part(),
            "tgs": self.tgs,
            "tflops_model": self.tflops,
            "mfu": self.mfu,
            "calibrated": self.calibrated,
        }


def workload_from_job(
    job: JobSpec, config: Mapping[str, Any], model: Model, gpus_per_node: int, device: Literal["cuda", "cpu"]
) -> Workload:
    """Return what a job does, as sizes.

    Attention is counted over whole packs where documents see each other, and where documents are not known.

    Args:
        job: The job.
        config: Its model's config.json.
        model: Its model's sizes.
        gpus_per_node: Workers that a node takes.
        device: What it runs on.
    """
    parallel, optim, spec = job.parallel, job.optim, job.model
    wide = resolve_dtype(spec.dtype, device) == "fp32"
    size = 4 if wide else 2
    return Workload(
        model=model,
        length_tokens=job.data.max_length,
        micro_batch_size=optim.micro_batch_size,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        world_size=parallel.workers,
        gpus_per_node=gpus_per_node,
        sequence_parallel_size=parallel.sequence_parallel_size,
        method=job.method.type,
        rank=job.method.rank,
        targets=job.method.target_modules,
        train_embeddings=job.method.train_embeddings,
        quantization=_quantization(job, config),
        casts_frozen_to_fp32=False,
        element_bytes=size,
        adapter_bytes=size,
        optimizer_bytes=_OPTIMIZER_BYTES.get(optim.optimizer, 8.0),
        zero_stage=parallel.zero_stage,
        offload=_offload(job, model, wide, device),
        offload_activations=parallel.offload_activations != "none",
        checkpointing=spec.gradient_checkpointing,
        loss_tile_tokens=spec.loss_tile_tokens or 0,
        mlp_tile_tokens=spec.mlp_tile_tokens or 0,
    )


def predict(
    work: Workload, cluster: ClusterSpec, calibration: CalibrationParams = CalibrationParams()
) -> Prediction:
    """Return what work needs and takes.

    Args:
        work: What is done.
        cluster: On what.
        calibration: What is known of the stack.
    """
    processor = cluster.device.is_cpu
    host, beside = host_memory_of_workload(work), 0.0
    if processor:  # a process, and both in one memory
        memory = gpu_memory(work, PROCESS_BYTES, collectives_bytes=0.0)
        beside = float(host.held)
    else:
        memory = gpu_memory(work)
    try:
        time = step_time(work, cluster.device, calibration.time)
    except MissingDeviceRates:
        time = None
    if processor and not calibration.calibrated:
        time = None  # the general constants are those of GPUs
    return Prediction(
        work=work,
        memory=memory,
        peak_bytes=calibration.memory.peak(memory) + beside,
        needed_bytes=calibration.memory.needed(memory) + beside,
        capacity_bytes=cluster.device.memory_bytes,
        offloaded_bytes=beside,
        unallocated_bytes=0.0 if processor else memory.context,
        host=host,
        host_bytes_per_node=host.total * min(work.world_size, cluster.gpus_per_node),
        host_capacity_bytes=None if processor else cluster.host_bytes_per_node,
        time=time,
        peak_flops=None if processor else cluster.device.peak_flops(dtype_of(work)),
        calibrated=calibration.calibrated,
    )


def _offload(job: JobSpec, model: Model, wide: bool, device: Literal["cuda", "cpu"]) -> Offload:
    """Return where a job's states are; the buffers of a disk are those of the configuration that will run."""
    parallel = job.parallel
    if "nvme" not in (parallel.offload_optimizer, parallel.offload_param):
        return Offload(parallel.offload_optimizer, parallel.offload_param)
    ds_config = render(job, "fp32" if wide else "bf16", device)
    size_nvme_buffers(ds_config, -(-model.parameters.largest // parallel.workers))
    return Offload.from_ds_config(ds_config)


def _quantization(
    job: JobSpec, config: Mapping[str, Any]
) -> Literal["none", "nf4", "int8", "gptq-int4", "gptq-int8"]:
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") == "gptq":
        return "gptq-int8" if stored.get("bits") == 8 else "gptq-int4"
    return job.method.quantization
