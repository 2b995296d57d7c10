"""Predicts memory and step time of a job on a given cluster, with error ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.auto_values import DeviceType, resolve_dtype
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
    step_time,
    tokens_per_gpu_second,
)
from orchestrator.planner.workload import Model, Workload
from orchestrator.planner.workload_flops import micro_batch_model_flops

MEMORY_RANGE = {True: 0.10, False: 0.25}
"""Relative error of the predicted peak that 90 % of published measurements stay within, by whether the stack
is calibrated; rounded up from the output of `tests.benchmarks.planner`."""
TIME_RANGE = {True: 0.20, False: 0.35}
"""The same for the step time."""
PROCESS_BYTES = 0.67 * GIB
"""Memory of a CPU worker with its libraries before the model is built: the residual of the twelve jobs in
tests/benchmarks/toy_jobs.yaml."""
MARGINS = {True: MARGIN, False: 0.15}
"""Required headroom as a fraction of the need; larger for an uncalibrated stack."""
_OPTIMIZER_BYTES = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
"""Two 8-bit moments per parameter. Other optimizers count as fp32 Adam, an upper bound for Muon."""


@dataclass(frozen=True)
class CalibrationParams:
    """Calibration parameters of a software stack.

    Attributes:
        memory: Memory parameters.
        time: Step time parameters.
        calibrated: Whether they were fitted to measured runs of this stack.
    """

    memory: MemoryParams = field(default_factory=MemoryParams)
    time: TimeParams = field(default_factory=TimeParams)
    calibrated: bool = False


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of an optimizer step.

    Attributes:
        work: The workload.
        memory: GPU memory in bytes by part.
        peak_bytes: Peak GPU memory.
        needed_bytes: GPU memory that has to fit.
        capacity_bytes: Memory of a GPU.
        offloaded_bytes: Offloaded state within the peak, if host and device share one memory (CPU).
        unallocated_bytes: Memory within the peak that torch's allocator does not manage (CUDA context).
        host: Host memory of a worker in bytes.
        host_bytes_per_node: Host memory of all workers on a node.
        host_capacity_bytes: Host memory of a node; None if unknown.
        time: Seconds of a step by part; None if the catalogue lacks rates of the device, and on CPU until a
            run there has been measured.
        peak_flops: Dense peak FLOP/s of the device; None if the catalogue has none, and on CPU.
        calibrated: Whether parameters fitted to this software stack were used.
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
        """Whether GPU memory and host memory suffice; the worse of both."""
        if self.host_capacity_bytes is not None and self.host_bytes_per_node > self.host_capacity_bytes:
            return "does not fit"
        return verdict(self.needed_bytes, self.capacity_bytes, MARGINS[self.calibrated])

    @property
    def seconds(self) -> float | None:
        """Seconds of an optimizer step."""
        return None if self.time is None else self.time.total

    @property
    def tgs(self) -> float | None:
        """Tokens per GPU and second for packs without padding."""
        if self.time is None:
            return None
        return tokens_per_gpu_second(self.work.at_mean_length(), self.time.total)

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s per GPU, as `orchestrator.arch.flops` defines them."""
        if self.time is None:
            return None
        return (
            self.work.gradient_accumulation_steps
            * micro_batch_model_flops(self.work.at_mean_length())
            / self.time.total
            / 1e12
        )

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the dense peak of the device."""
        return None if self.tflops is None or not self.peak_flops else self.tflops * 1e12 / self.peak_flops

    def as_json(self) -> dict[str, object]:
        """Return JSON values, with an error range per prediction."""
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
    job: JobSpec, config: Mapping[str, object], model: Model, gpus_per_node: int, device: DeviceType
) -> Workload:
    """Return the workload of a job, with attention over whole packs (an upper bound).

    Args:
        job: The job.
        config: The model's config.json.
        model: The model's sizes.
        gpus_per_node: Workers per node.
        device: Device type.
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
        length_variation=float(not (job.data.pads_packs or parallel.expandable_segments)),
    )


def predict(
    work: Workload, cluster: ClusterSpec, calibration: CalibrationParams = CalibrationParams()
) -> Prediction:
    """Predict memory and step time of a workload.

    Args:
        work: The workload.
        cluster: The nodes and devices.
        calibration: Calibration of the software stack.
    """
    is_cpu = cluster.device.is_cpu
    host, offloaded_bytes = host_memory_of_workload(work), 0.0
    if is_cpu:  # "device" memory is that of the process, shared with offloaded state
        memory = gpu_memory(work, PROCESS_BYTES, collectives_bytes=0.0)
        offloaded_bytes = float(host.held)
    else:
        memory = gpu_memory(work)
    try:
        time = step_time(work.at_mean_length(), cluster.device, calibration.time)
    except MissingDeviceRates:
        time = None
    if is_cpu and not calibration.calibrated:
        time = None  # the default parameters were fitted to GPUs
    return Prediction(
        work=work,
        memory=memory,
        peak_bytes=calibration.memory.peak(memory) + offloaded_bytes,
        needed_bytes=calibration.memory.needed(memory) + offloaded_bytes,
        capacity_bytes=cluster.device.memory_bytes,
        offloaded_bytes=offloaded_bytes,
        unallocated_bytes=0.0 if is_cpu else memory.context,
        host=host,
        host_bytes_per_node=host.total * min(work.world_size, cluster.gpus_per_node),
        host_capacity_bytes=None if is_cpu else cluster.host_bytes_per_node,
        time=time,
        peak_flops=None if is_cpu else cluster.device.peak_flops(dtype_of(work)),
        calibrated=calibration.calibrated,
    )


def _offload(job: JobSpec, model: Model, wide: bool, device: Literal["cuda", "cpu"]) -> Offload:
    """Return what is offloaded; NVMe buffer sizes come from the DeepSpeed configuration of the job."""
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
