"""Seconds of an optimizer step by part, predicted from sizes and a device of the catalogue.

Work follows `orchestrator.arch.flops`'s canon (arXiv 2104.04473) with what is recomputed, and
FlashAttention-2 (arXiv 2307.08691) for the scores it computes again; traffic follows ZeRO (arXiv 1910.02054)
and DeepSpeed-Ulysses (arXiv 2309.14509). Products, attention and memory-bound kernels follow one another on a
GPU and add up; where they are short, launching them takes longer. Communication overlaps in part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from orchestrator.arch.flops import (
    ForwardFlops,
    FrozenWeights,
    Recomputation,
    forward_flops,
    hardware_flops,
    model_flops,
    square_in_window,
)
from orchestrator.cluster.hardware import Device
from orchestrator.planner.memory import weight_bytes
from orchestrator.planner.workload import Quantization, Workload

MATMUL_SHARE = 0.859
"""Of the dense peak, that the best product reaches on a device of which nobody measured it: the A100's."""
FLASH_SHARE = 0.654
"""The same of flash attention."""
LINEAR_EFFICIENCY = 0.91
"""Of the best product, that products of thousands of tokens reach. This and the next five are one fit to the
rows of llama2-lora-3090, qwen-finetune and xtuner-speed-benchmark, held to what such kernels can reach."""
TILE_TOKENS = 128
"""Tokens that a product takes on top of its own: tiles that are not full, and waves that end early."""
ATTENTION_EFFICIENCY = 0.87
"""Of the best flash attention, that a model's reaches."""
LAYER_TRAFFIC = 25.0
"""How often what a layer keeps is read or written, much of it in fp32, by norms, rotation, gates and sums
that are kernels of their own, in a step with recomputation."""
LOSS_TRAFFIC = 6.0
"""How often what the loss holds is."""
ADAPTER_TRAFFIC = 1.0
"""Bytes that an adapter adds to what a layer keeps, for each of its output's numbers and twice for its
input's: dropout, copies in the adapter's format, and the sum."""
FLASH_PASSES = 2.5
"""Backward pass of flash attention in forward passes: it computes the scores again."""
SCORE_TRAFFIC_BYTES = 80.0
"""Read and written for a score of eager attention: forward, recomputed and backward."""
WEIGHT_TRAFFIC: dict[Quantization, float] = {
    "none": 0.0,
    "nf4": 5.0,
    "int8": 20.0,
    "gptq-int4": 20.0,
    "gptq-int8": 20.0,
}
"""Bytes moved to dequantise a weight once: nf4 in one kernel; int8 with its activations quantised as well,
and GPTQ in several kernels, as fits to llm-action's and Qwen's rows."""
LAUNCH_SECONDS = 0.0005
"""To launch a layer's forward pass from Python; the backward pass is two of them."""
ADAPTER_LAUNCH_SECONDS = 0.0002
"""The same for an adapter; a fit to Qwen's LoRA rows of 256 tokens, where 1.8B, 7B and 14B have the same."""
QUANTIZED_LAUNCH_SECONDS: dict[Quantization, float] = {"nf4": 0.00075, "int8": 0.0001}
"""The same for a matrix of bitsandbytes, whose nf4 scales are quantised again; a fit to llm-action's rows."""
ZERO_3_LAUNCH_SECONDS = 0.0023
"""The same for ZeRO-3's hooks about a layer's modules; a fit to Qwen's rows of full parameters."""
NVLINK_EFFICIENCY = 0.78
"""NCCL's bus bandwidth over one direction of NVLink: 235 of 300 GB/s on A100."""
PCIE_EFFICIENCY = 0.4
"""The same over PCIe through host memory; an assumption."""
NETWORK_EFFICIENCY = 0.88
"""The same over the network: 22 of 25 GB/s."""
EXPOSED = 0.3
"""Part of ZeRO's traffic that never overlaps."""
HOST_LINK_EFFICIENCY = 0.65
"""Copies between GPU and pinned host memory over one direction of PCIe: 20 to 25 of 32 GB/s."""
HOST_BANDWIDTH = 40e9
"""Bytes a second at which CPU Adam passes a node's states; a fit to llm-action's offloaded rows."""
STEP_BYTES = 32.0
"""Read and written for a parameter by Adam: weight, gradient and moments in fp32, and the 16-bit weight."""


@dataclass(frozen=True)
class TimeParams:
    """What a stack's time differs by.

    Attributes:
        efficiency: Of all that the GPU computes.
        launch_factor: On what launching takes: the speed of the hosts' processors.
        network_factor: On traffic between nodes: the network is seldom what a GPU's data sheet has.
    """

    efficiency: float = 1.0
    launch_factor: float = 1.0
    network_factor: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part.

    Attributes:
        linear: Products with weights.
        attention: Scores and values.
        elementwise: Kernels that memory bounds: norms, gates, loss.
        dequantization: Making 16-bit weights of quantised ones.
        launch: Waiting for kernels to be launched.
        zero: ZeRO's and data parallelism's traffic inside nodes that computing does not hide.
        ulysses: Exchanges of shared sequences inside nodes.
        network: Both between nodes.
        fetch: Copies of offloaded parameters that computing does not hide.
        offload: Copies of gradients and activations, and CPU Adam.
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
        """What the GPU computes for."""
        return self.linear + self.attention + self.elementwise + self.dequantization + self.optimizer

    @property
    def total(self) -> float:
        """All of the step."""
        return float(sum(getattr(self, each.name) for each in fields(self)))

    def by_part(self) -> dict[str, float]:
        """Return the parts by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class MicroSteps:
    """Seconds of a step's parts before what overlaps is left out, for a stack like none in particular.

    Attributes:
        count: Micro-batches of a step.
        parts: Of one micro-batch, where nothing is hidden; `offload` and `optimizer` are the step's.
    """

    count: int
    parts: StepTime

    def step(self, params: TimeParams = TimeParams()) -> StepTime:
        """Return the seconds of a step of a stack with these constants."""
        parts, steps, work = self.parts, float(self.count), self.count / params.efficiency
        kernels = (parts.linear + parts.attention + parts.elementwise) / params.efficiency
        launches = parts.launch * params.launch_factor
        # The larger of the two, but near their crossing neither hides the other entirely.
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
    """The catalogue has no peak or bandwidth for a device and number format."""


def micro_steps(work: Workload, device: Device) -> MicroSteps:
    """Return the seconds of a step's parts.

    Args:
        work: What is trained and how.
        device: Of the catalogue.

    Raises:
        MissingDeviceRates: The catalogue lacks what the prediction needs.
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
    """Return the seconds of an optimizer step by part.

    Args:
        work: What is trained and how.
        device: Of the catalogue.
        params: Of the software stack.

    Raises:
        MissingDeviceRates: The catalogue lacks what the prediction needs.
    """
    return micro_steps(work, device).step(params)


def tokens_per_gpu_second(work: Workload, seconds: float) -> float:
    """Return TGS: a GPU's tokens of a step over its seconds; with shared sequences each has its share."""
    return work.tokens * work.gradient_accumulation_steps / seconds


def micro_batch_forward_flops(work: Workload) -> ForwardFlops:
    """Return the FLOPs of one forward pass over a worker's micro-batch."""
    seen = work.attended_tokens  # the micro-batch counts as tokens / seen documents of this length
    documents = work.tokens / seen
    return forward_flops(
        work.model.shape,
        work.tokens,
        documents * seen**2,
        work.tokens * work.labelled_share,
        documents * square_in_window(seen, work.model.shape.window),
        work.num_adapter_params,
    )


def linear_flops(work: Workload) -> float:
    """Return the FLOPs of a worker's micro-batch in matmuls with weights, including recomputation.

    A layer is recomputed as a whole here, its last matmul included: `LINEAR_EFFICIENCY` was fitted so.
    """
    matmuls = replace(micro_batch_forward_flops(work), attention=0.0)
    recomputed = Recomputation(work.checkpointing, tiled_head=work.loss_tile_tokens > 0, whole_layers=True)
    return hardware_flops(matmuls, recomputed, frozen_weights(work))


def attention_flops(work: Workload) -> float:
    """Return the FLOPs of one causal forward pass of attention over a worker's micro-batch."""
    return micro_batch_forward_flops(work).attention


def micro_batch_model_flops(work: Workload) -> float:
    """Return the model FLOPs of a worker's micro-batch, without recomputation."""
    return model_flops(micro_batch_forward_flops(work), frozen_weights(work))


def frozen_weights(work: Workload) -> FrozenWeights:
    """Return which weights need no gradient."""
    is_lora = work.method == "lora"
    return FrozenWeights(layers=is_lora, head=is_lora and not work.train_embeddings)


def _attention_seconds(work: Workload, rates: _Rates) -> float:
    forward, again = attention_flops(work), 1.0 if work.checkpointing == "full" else 0.0
    if work.flash:
        return (1.0 + again + FLASH_PASSES) * forward / rates.attention
    scores = float(work.tokens) * work.model.shape.heads * work.length_tokens * work.model.shape.layers
    traffic = SCORE_TRAFFIC_BYTES * (3.0 + again) / 4.0 * scores / rates.bandwidth
    return traffic + (3.0 + again) * 2.0 * forward / rates.products  # the whole square


def _elementwise_bytes(work: Workload) -> float:
    shape = work.model.shape
    inner = (8 if shape.mlp_matrices == 3 else 4) * shape.intermediate_size
    width = (
        18 * shape.hidden_size
        + 4 * shape.heads * shape.head_dim
        + 8 * shape.kv_heads * shape.head_dim
        + inner
    )
    passes = LAYER_TRAFFIC * (0.75 if work.checkpointing == "none" else 1.0)
    beside = ADAPTER_TRAFFIC * sum(2 * each.inputs + each.outputs for each in work.adapted_linears)
    layers = passes * shape.layers * (width + beside) * work.element_bytes / 2
    loss = LOSS_TRAFFIC * work.logit_bytes * shape.vocab_size * work.labelled_share
    return work.tokens * (layers + loss)


def _dequantized_bytes(work: Workload) -> float:
    found = work.model.parameters
    passes = 3.0 if work.checkpointing == "full" else 2.0
    return passes * WEIGHT_TRAFFIC[work.quantization] * found.layers * found.matrices_per_layer


def _launch_seconds(work: Workload) -> float:
    passes = 3.0 if work.checkpointing == "none" else 4.0
    seconds = LAUNCH_SECONDS + ADAPTER_LAUNCH_SECONDS * len(work.adapted_linears)
    if work.zero_stage == 3:
        seconds += ZERO_3_LAUNCH_SECONDS
    seconds += QUANTIZED_LAUNCH_SECONDS.get(work.quantization, 0.0) * len(work.model.parameters.linears)
    return seconds * passes * work.model.shape.layers


def _traffic(work: Workload, device: Device) -> tuple[float, float, float]:
    """Return seconds of ZeRO and Ulysses inside nodes and of both between nodes, for a micro-batch."""
    world, nodes = work.world_size, max(1, work.world_size // work.gpus_per_node)
    if world == 1:
        return 0.0, 0.0, 0.0
    inside, between = _links(device)
    ring = min(inside, between * work.gpus_per_node) if nodes > 1 else inside
    zero = _zero_bytes(work) * (world - 1) / world / ring
    size = work.sequence_parallel_size
    exchanged = _ulysses_bytes(work) * (size - 1) / size
    spread = max(1, size // work.gpus_per_node)
    away = exchanged * (1.0 - 1.0 / spread)
    network = away / between + (EXPOSED * zero if nodes > 1 else 0.0)
    return (0.0 if nodes > 1 else zero), (exchanged - away) / inside, network


def _zero_bytes(work: Workload) -> float:
    """Return what a worker sends and receives in a micro-batch for states that are partitioned."""
    if work.zero_stage == 3:
        # Gathered forward and backward, where a recomputed layer is gathered once; gradients are reduced.
        return 2.0 * _base_bytes(work) + work.element_bytes * work.num_trainable_params
    once = 2.0 * work.element_bytes * work.num_trainable_params  # a reduction and, at the step, a gather
    return once if work.zero_stage == 2 else once / work.gradient_accumulation_steps


def _base_bytes(work: Workload) -> float:
    """Return the bytes of all weights: what ZeRO-3 gathers in a pass."""
    return (
        weight_bytes(work) * work.world_size
        if not work.offload_param
        else (float(work.element_bytes) * work.model.parameters.total)
    )


def _ulysses_bytes(work: Workload) -> float:
    """Return what a worker exchanges in a micro-batch: queries, keys, values and outputs, three times."""
    if work.sequence_parallel_size == 1:
        return 0.0
    shape = work.model.shape
    width = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    passes = 3.0 if work.checkpointing == "full" else 2.0
    return passes * shape.layers * width * work.element_bytes * work.tokens


def _fetch_seconds(work: Workload, device: Device) -> float:
    """Return the seconds of a micro-batch's copies of offloaded parameters: forward, recomputed, backward."""
    if not work.offload_param:
        return 0.0
    return 3.0 * work.element_bytes * work.model.parameters.total / work.world_size / _host_link(device)


def _offload_seconds(work: Workload, device: Device) -> float:
    """Return a step's seconds of CPU Adam and of copies that nothing hides."""
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
    """Return bytes a second between GPU and host."""
    if not device.host_link_gb_per_second:
        raise MissingDeviceRates(
            f"device {device.name} has no host_link_gb_per_second in the catalogue; add it"
        )
    return HOST_LINK_EFFICIENCY * device.host_link_gb_per_second / 2 * 1e9


def dtype_of(work: Workload) -> Literal["fp32", "bf16"]:
    """Return the number format whose peak bounds the work."""
    return "fp32" if work.element_bytes == 4 else "bf16"


@dataclass(frozen=True)
class _Rates:
    """What a device does in a second: operations of products and of attention, bytes of its memory."""

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
    """Return bytes a second inside a node and, for each GPU, between nodes."""
    one_way = (device.interconnect_gb_per_second or 0.0) / 2 * 1e9
    inside = one_way * (NVLINK_EFFICIENCY if device.interconnect == "nvlink" else PCIE_EFFICIENCY)
    between = NETWORK_EFFICIENCY * (device.network_gb_per_second or 0.0) * 1e9
    if not inside or not between:
        raise MissingDeviceRates(
            f"device {device.name} has no interconnect or network in the catalogue; add them"
        )
    return inside, between
