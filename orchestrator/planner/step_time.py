"""Predicts the time of an optimizer step by component, from tensor sizes and a device of the catalogue.

FLOPs follow `orchestrator.arch.flops` (arXiv 2104.04473) plus recomputation, and FlashAttention-2 (arXiv
2307.08691) for the scores recomputed in its backward pass. Communication volume follows ZeRO (arXiv
1910.02054) and DeepSpeed-Ulysses (arXiv 2309.14509). Matmuls, attention and memory-bound kernels run
sequentially on a GPU, so their times add up; short kernels are bound by launch time. Communication overlaps
in part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from orchestrator.cluster.hardware import Device
from orchestrator.planner.memory import weight_bytes
from orchestrator.planner.workload import Quantization, Workload
from orchestrator.planner.workload_flops import attention_flops, linear_flops

MATMUL_SHARE = 0.859
"""Fraction of the dense peak that the fastest matmul reaches if the device has no measurement: the A100's."""
FLASH_SHARE = 0.654
"""The same fraction for flash attention."""
LINEAR_EFFICIENCY = 0.91
"""Fraction of the fastest matmul that matmuls over thousands of tokens reach. This constant and the next five
were fitted jointly to llama2-lora-3090, qwen-finetune and xtuner-speed-benchmark, within plausible bounds."""
TILE_TOKENS = 128
"""Tokens added to the size of a matmul, for partial tiles and the last wave (tile and wave quantization)."""
ATTENTION_EFFICIENCY = 0.87
"""Fraction of the fastest flash attention that attention in a model reaches."""
LAYER_TRAFFIC = 25.0
"""Reads and writes of a layer's activations, many in fp32, by the separate kernels of norms, RoPE, gates and
residual additions in a step with recomputation."""
LOSS_TRAFFIC = 6.0
"""Reads and writes of the logits memory in the loss."""
ADAPTER_TRAFFIC = 1.0
"""Bytes that an adapter adds to a layer's activations per output element, and twice that per input element:
dropout, casts to the adapter's dtype, and the addition."""
FLASH_PASSES = 2.5
"""FLOPs of the backward pass of flash attention relative to its forward pass; it recomputes the scores."""
SCORE_TRAFFIC_BYTES = 80.0
"""Bytes read and written per score of eager attention over forward, recomputation and backward."""
WEIGHT_TRAFFIC: dict[Quantization, float] = {
    "none": 0.0,
    "nf4": 5.0,
    "int8": 20.0,
    "gptq-int4": 20.0,
    "gptq-int8": 20.0,
}
"""Bytes read and written to dequantize a weight once: nf4 in one kernel; int8, which also quantizes
activations, and GPTQ in several kernels. Fitted to the results of llm-action and Qwen."""
LAUNCH_SECONDS = 0.0005
"""Seconds to launch the kernels of a layer's forward pass from Python; a backward pass takes twice that."""
ADAPTER_LAUNCH_SECONDS = 0.0002
"""Launch time of an adapter; fitted to Qwen's LoRA results at 256 tokens, equal for 1.8B, 7B and 14B."""
QUANTIZED_LAUNCH_SECONDS: dict[Quantization, float] = {"nf4": 0.00075, "int8": 0.0001}
"""Launch time of a bitsandbytes linear layer; nf4 also dequantizes its scales. Fitted to llm-action."""
ZERO_3_LAUNCH_SECONDS = 0.0023
"""Time of the ZeRO-3 hooks on a layer's modules; fitted to Qwen's full-parameter results."""
NVLINK_EFFICIENCY = 0.78
"""NCCL bus bandwidth relative to one direction of NVLink: 235 of 300 GB/s on A100."""
PCIE_EFFICIENCY = 0.4
"""NCCL bus bandwidth relative to one direction of PCIe through host memory; an assumption."""
NETWORK_EFFICIENCY = 0.88
"""NCCL bus bandwidth relative to the network's: 22 of 25 GB/s."""
EXPOSED = 0.3
"""Fraction of ZeRO's communication that never overlaps with computation."""
HOST_LINK_EFFICIENCY = 0.65
"""Copy bandwidth between GPU and pinned memory relative to one direction of PCIe: 20 to 25 of 32 GB/s."""
HOST_BANDWIDTH = 40e9
"""Bytes per second that CPU Adam reads and writes on a node; fitted to llm-action's offloaded results."""
STEP_BYTES = 32.0
"""Bytes that Adam reads and writes per parameter: fp32 weight, gradient and moments, and 16-bit weight."""


@dataclass(frozen=True)
class TimeParams:
    """Calibration parameters of a software stack for step time.

    Attributes:
        efficiency: Divides the time of all GPU computation.
        launch_factor: Multiplies kernel launch time; depends on the host CPU.
        network_factor: Multiplies communication time between nodes, whose network often differs from the
            catalogue.
    """

    efficiency: float = 1.0
    launch_factor: float = 1.0
    network_factor: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Time of an optimizer step by component, in seconds.

    Attributes:
        linear: Matmuls with weights.
        attention: Attention scores and their product with values.
        elementwise: Memory-bound kernels: norms, gates, loss.
        dequantization: Dequantization of weights to 16 bits.
        launch: Idle time of the GPU while kernels are launched.
        zero: Exposed communication of ZeRO and data parallelism within nodes.
        ulysses: All-to-all of sequence parallelism within nodes.
        network: Communication of both between nodes.
        fetch: Exposed copies of offloaded parameters to the GPU.
        offload: Copies of offloaded gradients and activations, and CPU Adam.
        optimizer: Adam on the GPU.
    """

    linear: float
    attention: float
    elementwise: float
    dequantization: float
    launch: float
    zero: float
    ulysses: float
    network: float
    fetch: float
    offload: float
    optimizer: float

    @property
    def busy(self) -> float:
        """Time in which the GPU computes, in seconds."""
        return self.linear + self.attention + self.elementwise + self.dequantization + self.optimizer

    @property
    def total(self) -> float:
        """Time of the whole step, in seconds."""
        return float(sum(getattr(self, each.name) for each in fields(self)))

    def by_part(self) -> dict[str, float]:
        """Return the seconds of every component by field name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class MicroSteps:
    """Time of a step by component without overlap and without calibration.

    Attributes:
        count: Micro-batches per step (gradient accumulation steps).
        parts: Seconds of one micro-batch without overlap; `offload` and `optimizer` are per step.
    """

    count: int
    parts: StepTime

    def step(self, params: TimeParams = TimeParams()) -> StepTime:
        """Return the time of a step with overlap, for given calibration parameters."""
        parts, steps, work = self.parts, float(self.count), self.count / params.efficiency
        kernels = (parts.linear + parts.attention + parts.elementwise) / params.efficiency
        launches = parts.launch * params.launch_factor
        # Smooth maximum (4-norm) of kernel and launch time: if both are similar, they overlap only partly.
        waiting = (kernels**4 + launches**4) ** 0.25 - kernels
        return StepTime(
            linear=parts.linear * work,
            attention=parts.attention * work,
            elementwise=parts.elementwise * work,
            dequantization=parts.dequantization * work,
            launch=waiting * steps,
            zero=max(EXPOSED * parts.zero, parts.zero - kernels) * steps,
            ulysses=parts.ulysses * steps,
            network=parts.network * steps * params.network_factor,
            fetch=max(0.0, parts.fetch - kernels) * steps,
            offload=parts.offload / params.efficiency,
            optimizer=parts.optimizer / params.efficiency,
        )


class MissingDeviceRates(ValueError):
    """The catalogue has no peak or bandwidth for a device and dtype."""


def micro_steps(work: Workload, device: Device) -> MicroSteps:
    """Return the time of a micro-batch by component, before overlap and calibration.

    Args:
        work: The workload.
        device: Device of the catalogue.

    Raises:
        MissingDeviceRates: The catalogue lacks a rate of the device.
    """
    rates = _rates(work, device)
    zero, ulysses, network = _traffic(work, device)
    shared = work.world_size if work.zero_stage >= 1 else 1
    parts = StepTime(
        linear=(1 + TILE_TOKENS / work.tokens) * linear_flops(work) / rates.products,
        attention=_attention_seconds(work, rates),
        elementwise=_elementwise_bytes(work) / rates.bandwidth,
        dequantization=_dequantized_bytes(work) / rates.bandwidth,
        launch=_launch_seconds(work),
        zero=zero,
        ulysses=ulysses,
        network=network,
        fetch=_fetch_seconds(work, device),
        offload=_offload_seconds(work, device),
        optimizer=0.0
        if work.offload_optimizer
        else STEP_BYTES * work.num_trainable_params / shared / rates.bandwidth,
    )
    return MicroSteps(work.gradient_accumulation_steps, parts)


def step_time(work: Workload, device: Device, params: TimeParams = TimeParams()) -> StepTime:
    """Return the time of an optimizer step by component, in seconds.

    Args:
        work: The workload.
        device: Device of the catalogue.
        params: Calibration parameters of the software stack.

    Raises:
        MissingDeviceRates: The catalogue lacks a rate of the device.
    """
    return micro_steps(work, device).step(params)


def tokens_per_gpu_second(work: Workload, seconds: float) -> float:
    """Return TGS: tokens of a GPU per step divided by step time; sequence parallelism splits the tokens."""
    return work.tokens * work.gradient_accumulation_steps / seconds


def _attention_seconds(work: Workload, rates: _Rates) -> float:
    """Return the attention time of a micro-batch: compute-bound with flash, else with traffic of scores."""
    forward, again = attention_flops(work), 1.0 if work.checkpointing == "full" else 0.0
    if work.flash:
        return (1.0 + again + FLASH_PASSES) * forward / rates.attention
    scores = float(work.tokens) * work.model.shape.heads * work.length_tokens * work.model.shape.layers
    traffic = SCORE_TRAFFIC_BYTES * (3.0 + again) / 4.0 * scores / rates.bandwidth
    # Eager attention computes the full [length, length] scores, twice the FLOPs of the causal half. Forward
    # is one pass, backward two.
    return traffic + (3.0 + again) * 2.0 * forward / rates.products


def _elementwise_bytes(work: Workload) -> float:
    """Return the bytes that memory-bound kernels read and write in a micro-batch."""
    shape = work.model.shape
    # The same bytes per token as in `memory._layer`: h = hidden_size, q, kv, i.
    inner = (8 if shape.mlp_matrices == 3 else 4) * shape.intermediate_size
    width = (
        18 * shape.hidden_size
        + 4 * shape.heads * shape.head_dim
        + 8 * shape.kv_heads * shape.head_dim
        + inner
    )
    passes = LAYER_TRAFFIC * (0.75 if work.checkpointing == "none" else 1.0)
    adapters = ADAPTER_TRAFFIC * sum(2 * each.inputs + each.outputs for each in work.adapted_linears)
    layers = passes * shape.layers * (width + adapters) * work.element_bytes / 2
    loss = LOSS_TRAFFIC * work.logit_bytes * shape.vocab_size * work.labelled_share
    return work.tokens * (layers + loss)


def _dequantized_bytes(work: Workload) -> float:
    """Return the bytes read and written to dequantize all linear weights in every pass of a micro-batch."""
    found = work.model.parameters
    passes = 3.0 if work.checkpointing == "full" else 2.0
    return passes * WEIGHT_TRAFFIC[work.quantization] * found.layers * found.matrices_per_layer


def _launch_seconds(work: Workload) -> float:
    """Return the kernel launch time of a micro-batch."""
    # Forward is one pass, backward two, recomputation one.
    passes = 3.0 if work.checkpointing == "none" else 4.0
    seconds = LAUNCH_SECONDS + ADAPTER_LAUNCH_SECONDS * len(work.adapted_linears)
    if work.zero_stage == 3:
        seconds += ZERO_3_LAUNCH_SECONDS
    seconds += QUANTIZED_LAUNCH_SECONDS.get(work.quantization, 0.0) * len(work.model.parameters.linears)
    return seconds * passes * work.model.shape.layers


def _traffic(work: Workload, device: Device) -> tuple[float, float, float]:
    """Return seconds per micro-batch of ZeRO within nodes, Ulysses within nodes, and both between nodes."""
    world, nodes = work.world_size, max(1, work.world_size // work.gpus_per_node)
    if world == 1:
        return 0.0, 0.0, 0.0
    inside, between = _links(device)
    # A ring over nodes is as slow as its slowest link; between nodes it uses all network cards of a node.
    ring = min(inside, between * work.gpus_per_node) if nodes > 1 else inside
    zero = _zero_bytes(work) * (world - 1) / world / ring
    size = work.sequence_parallel_size
    exchanged = _ulysses_bytes(work) * (size - 1) / size
    spread = max(1, size // work.gpus_per_node)
    away = exchanged * (1.0 - 1.0 / spread)
    network = away / between + (EXPOSED * zero if nodes > 1 else 0.0)
    return (0.0 if nodes > 1 else zero), (exchanged - away) / inside, network


def _zero_bytes(work: Workload) -> float:
    """Return the bytes that a worker communicates per micro-batch for ZeRO or data parallelism."""
    if work.zero_stage == 3:
        # All-gather in forward and backward (recomputation shares the latter), reduce-scatter of gradients.
        return 2.0 * _base_bytes(work) + work.element_bytes * work.num_trainable_params
    # Reduce-scatter of gradients and all-gather of updated parameters; an all-reduce has the same volume.
    once = 2.0 * work.element_bytes * work.num_trainable_params
    return once if work.zero_stage == 2 else once / work.gradient_accumulation_steps


def _base_bytes(work: Workload) -> float:
    """Return the bytes of all weights, which ZeRO-3 gathers in each pass."""
    return (
        weight_bytes(work) * work.world_size
        if not work.offload_param
        else (float(work.element_bytes) * work.model.parameters.total)
    )


def _ulysses_bytes(work: Workload) -> float:
    """Return the bytes that a worker exchanges per micro-batch in the all-to-alls of Ulysses.

    Queries, keys, values and attention outputs are exchanged in forward, recomputation and backward.
    """
    if work.sequence_parallel_size == 1:
        return 0.0
    shape = work.model.shape
    width = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    passes = 3.0 if work.checkpointing == "full" else 2.0
    return passes * shape.layers * width * work.element_bytes * work.tokens


def _fetch_seconds(work: Workload, device: Device) -> float:
    """Return the seconds per micro-batch to copy offloaded parameters in forward, recomputation, backward."""
    if not work.offload_param:
        return 0.0
    return 3.0 * work.element_bytes * work.model.parameters.total / work.world_size / _host_link(device)


def _offload_seconds(work: Workload, device: Device) -> float:
    """Return the seconds per step of CPU Adam and of exposed copies of gradients and activations."""
    found = 0.0
    if work.offload_optimizer:
        here = min(work.world_size, work.gpus_per_node) / (work.world_size if work.zero_stage else 1)
        found += STEP_BYTES * work.num_trainable_params * here / HOST_BANDWIDTH
        found += 2.0 * work.element_bytes * work.num_trainable_params / work.world_size / _host_link(device)
    if work.offload_activations:
        kept = work.element_bytes * work.model.shape.hidden_size * work.model.shape.layers * work.tokens
        found += EXPOSED * 2.0 * kept * work.gradient_accumulation_steps / _host_link(device)
    return found


def _host_link(device: Device) -> float:
    """Return the bandwidth between GPU and host in one direction, in bytes per second."""
    if not device.host_link_gb_per_second:
        raise MissingDeviceRates(
            f"device {device.name} has no host_link_gb_per_second in the catalogue; add it"
        )
    return HOST_LINK_EFFICIENCY * device.host_link_gb_per_second / 2 * 1e9


def dtype_of(work: Workload) -> Literal["fp32", "bf16"]:
    """Return the dtype whose peak FLOPS bounds the workload."""
    return "fp32" if work.element_bytes == 4 else "bf16"


@dataclass(frozen=True)
class _Rates:
    """Achieved rates of a device: FLOPS of matmuls and attention, memory bandwidth in bytes per second."""

    products: float
    attention: float
    bandwidth: float


def _rates(work: Workload, device: Device) -> _Rates:
    dtype = dtype_of(work)
    peak, bandwidth = device.peak_flops(dtype), device.memory_bandwidth_gb_per_second
    if peak is None or bandwidth is None:
        raise MissingDeviceRates(
            f"The catalogue has no {dtype} peak or no memory bandwidth for device {device.name}, so its "
            "speed cannot be predicted; add them with --catalogue."
        )
    matmul = device.achieved_fraction("matmul") or MATMUL_SHARE
    flash = device.achieved_fraction("flash_attention") or FLASH_SHARE
    return _Rates(LINEAR_EFFICIENCY * matmul * peak, ATTENTION_EFFICIENCY * flash * peak, bandwidth * 1e9)


def _links(device: Device) -> tuple[float, float]:
    """Return the bandwidth per GPU within a node and between nodes, in bytes per second."""
    one_way = (device.interconnect_gb_per_second or 0.0) / 2 * 1e9
    inside = one_way * (NVLINK_EFFICIENCY if device.interconnect == "nvlink" else PCIE_EFFICIENCY)
    between = NETWORK_EFFICIENCY * (device.network_gb_per_second or 0.0) * 1e9
    if not inside or not between:
        raise MissingDeviceRates(
            f"device {device.name} has no interconnect or network in the catalogue; add them"
        )
    return inside, between
