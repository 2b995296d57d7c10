"""Memory of a training step by part, on the GPU and on the host, predicted from sizes alone.

Bytes follow ZeRO (arXiv 1910.02054) for states, Korthikanti et al. (arXiv 2205.05198) for activations, with
the terms of RMSNorm, SwiGLU and grouped heads counted the same way, QLoRA (arXiv 2305.14314) and GPTQ (arXiv
2210.17323) for bits of weights, and DeepSpeed 0.19 for its buffers. The loss, a layer's backward pass and the
optimizer's step do not stand at one time: the largest of these three moments is the peak.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from orchestrator.arch.parameters import ParameterCount
from orchestrator.planner.host_memory import HostMemory, offloaded
from orchestrator.planner.workload import Quantization, Workload

GIB = 2**30
CONTEXT_BYTES = 0.6 * GIB
"""What CUDA, cuBLAS and the kernels take before the first tensor: 0.4 to 0.8 GiB as nvidia-smi shows it."""
COLLECTIVES_BYTES = 1.0 * GIB
"""NCCL's channels, and workspaces of the streams beside them, where there are several workers."""
BITS: dict[Quantization, float] = {
    "none": 16.0,
    "nf4": 4.127,
    "int8": 8.08,
    "gptq-int4": 4.16,
    "gptq-int8": 8.16,
}
"""Of a quantised weight with its scales: nf4 in blocks of 64 with scales quantised again, int8 with one scale
a row, GPTQ in groups of 128 with a scale of 16 bits and a zero point."""
SCORE_BYTES = 17.0
"""Of a score of eager attention at its softmax's backward: probabilities in fp32 and 16 bits (6), the
gradients of both (6), and that of the scores in both (6), of which autograd frees a part as it goes."""
KEPT_SCORE_BYTES = 3.0
"""Of a score that is kept for the backward pass: the probability and the mask's bit."""
REDUCE_BUCKET = 200_000_000
"""Elements of ds_configs' `reduce_bucket_size`; twice, since communication overlaps."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements of ds_configs' `stage3_max_live_parameters`."""
PREFETCH = 50_000_000
"""Elements of ds_configs' `stage3_prefetch_bucket_size`."""
SUB_GROUP = 1_000_000_000
"""Elements of ds_configs' `sub_group_size`: what ZeRO-3 steps at once."""
FRAGMENTATION = 0.75
"""What the allocator wastes of activations where every micro-batch has another length; a fit to the LoRA rows
of ms-swift's benchmark from 512 to 8192 tokens, whose rows are 3,200 long on average."""

RETAINED = 0.4
"""What the allocator still holds of the smaller of loss and step, whose blocks the larger cannot use, since
they have other sizes; a fit to the six rows of full parameters in ms-swift's benchmark."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on a worker's GPU by part, each at its own largest.

    Attributes:
        weights: Weights that stay, quantised ones in their bits.
        gradients: Gradients that stay.
        optimizer: The optimizer's state and fp32 copies.
        gathered_params: Weights that ZeRO-3 has gathered.
        buffers: Buckets of gradients.
        activations: What the forward pass keeps for the backward pass.
        layer: One layer's own, while it is recomputed and differentiated.
        logits: Logits and what the loss makes of them.
        step: What the optimizer's step takes for a moment.
        quantization: The weight that is dequantised for a product.
        context: CUDA and NCCL.
        fragmentation: What the allocator wastes of activations where lengths vary.
        retained: What it still holds of the smaller of loss and step, and of ZeRO-3's gradients.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered_params: float
    buffers: float
    activations: float
    layer: float
    logits: float
    step: float
    quantization: float
    context: float
    fragmentation: float
    retained: float

    @property
    def states(self) -> float:
        """What is there through forward, backward and step."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.context

    @property
    def loss_peak(self) -> float:
        """At the loss, when all layers have run."""
        return self.states + self.gathered_params + self.activations + self.logits

    @property
    def backward_peak(self) -> float:
        """In a layer's backward pass."""
        return self.states + self.gathered_params + self.activations + self.layer + self.quantization

    @property
    def step_peak(self) -> float:
        """In the optimizer's step; what ZeRO-3 has gathered last may still be there."""
        return self.states + self.gathered_params + self.step

    @property
    def required(self) -> float:
        """The largest of the three moments: where a GPU has less, nothing helps."""
        return max(self.loss_peak, self.backward_peak, self.step_peak)

    @property
    def peak(self) -> float:
        """What the allocator has reserved at the largest of them."""
        forward = max(self.loss_peak, self.backward_peak) + self.fragmentation
        return max(forward, self.step_peak) + self.retained

    def by_part(self) -> dict[str, float]:
        """Return the parts by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def gpu_memory(
    work: Workload, context_bytes: float = CONTEXT_BYTES, collectives_bytes: float = COLLECTIVES_BYTES
) -> GpuMemory:
    """Return what a worker needs on its GPU.

    Args:
        work: What is trained and how.
        context_bytes: What CUDA takes; 0 to compare with torch's own figures.
        collectives_bytes: What collectives take beside it, where there are any.
    """
    kept, layer, logits = kept_bytes(work), layer_bytes(work), loss_bytes(work)
    moment, step = kept + max(layer, logits), _step(work)
    shared = work.world_size if work.zero_stage >= 1 else 1
    many = work.world_size > 1
    return GpuMemory(
        weights=weight_bytes(work),
        gradients=gradient_bytes(work),
        optimizer=0.0 if work.offload_optimizer else optimizer_bytes(work) / shared,
        gathered_params=_gathered_params(work),
        buffers=_buffers(work),
        activations=kept,
        layer=layer,
        logits=logits,
        step=step,
        quantization=0.0 if work.quantization == "none" else 2.0 * work.element_bytes * _largest_linear(work),
        context=context_bytes + (collectives_bytes if many and context_bytes else 0.0),
        fragmentation=FRAGMENTATION * work.length_variation**2 * moment,
        retained=RETAINED * min(step, moment) + _reserved_gradients(work),
    )


def host_memory_of_workload(work: Workload) -> HostMemory:
    """Return what a worker needs in its node's memory for what is offloaded.

    Args:
        work: What is trained and how.
    """
    found = work.model.parameters
    count = ParameterCount(
        found.total + work.num_adapter_params + work.num_copied_params,
        work.num_trainable_params,
        found.largest,
    )
    shared = work.world_size if work.zero_stage >= 1 else 1
    states = offloaded(work.offload, work.zero_stage, work.element_bytes, count, shared)
    return replace(states, activations=round(_inputs(work))) if work.offload_activations else states


def weight_bytes(work: Workload) -> float:
    """Return the bytes of all weights that stay on the GPU, adapters among them."""
    found, size = work.model.parameters, float(work.element_bytes)
    linears = float(found.layers * found.matrices_per_layer)
    rest = found.total - linears
    if work.quantization == "none":
        base = size * (linears + rest)
    else:
        bitsandbytes = work.quantization in ("nf4", "int8")
        base = BITS[work.quantization] / 8 * linears
        base += (4.0 if bitsandbytes and work.casts_frozen_to_fp32 else size) * rest
    beside = work.adapter_bytes * work.num_adapter_params + size * work.num_copied_params
    if work.zero_stage < 3:
        return base + beside
    return 0.0 if work.offload_param else (base + beside) / work.world_size


def gradient_bytes(work: Workload) -> float:
    """Return the bytes of gradients that stay on the GPU between micro-batches."""
    if work.offload_optimizer and work.zero_stage >= 2:
        return 0.0
    size = work.adapter_bytes * work.num_adapter_params + work.element_bytes * (
        work.num_trainable_params - work.num_adapter_params
    )
    return float(size) / (work.world_size if work.zero_stage >= 2 else 1)


def optimizer_bytes(work: Workload) -> float:
    """Return the bytes of the optimizer's state over all workers, wherever it is."""
    wide = work.num_adapter_params if work.adapter_bytes == 4 else 0
    narrow = work.num_trainable_params - wide
    # ZeRO copies its partition even where the weights are fp32 themselves.
    partition = 4.0 if work.zero_stage >= 1 else 0.0
    copies = 4.0 if work.master_weights else 0.0
    # Without fp32 copies the moments have the weights' own format.
    moments = work.optimizer_bytes if copies or work.element_bytes == 4 else work.optimizer_bytes / 2
    copies = partition if work.element_bytes == 4 else copies
    return (moments + copies) * narrow + (work.optimizer_bytes + partition) * wide


def kept_bytes(work: Workload) -> float:
    """Return the bytes that the forward pass keeps on the GPU for the backward pass."""
    layers = work.model.shape.layers
    if work.checkpointing == "full":
        inputs = _inputs(work)
        return 2 * inputs / layers if work.offload_activations else inputs
    scores = 0.0 if work.flash else KEPT_SCORE_BYTES * _scores(work)
    if work.checkpointing == "selective":
        return layers * (_products(work) + scores)
    return layers * (_layer(work, saves_all=False) + scores)


def layer_bytes(work: Workload) -> float:
    """Return the bytes of one layer's own activations in its backward pass; gradients take their places."""
    scores = 0.0 if work.flash else SCORE_BYTES * _scores(work)
    return _layer(work, saves_all=True) + scores


def loss_bytes(work: Workload) -> float:
    """Return the bytes of logits and loss: all at once, or one tile of them and its gradient."""
    scored = work.tokens * work.largest_labelled_share
    tokens = min(scored, work.loss_tile_tokens) if work.loss_tile_tokens else scored
    tiled = (
        2.0 * work.element_bytes * work.model.shape.hidden_size * work.tokens
        if work.loss_tile_tokens
        else 0.0
    )
    return work.logit_bytes * work.element_bytes / 2 * work.model.shape.vocab_size * tokens + tiled


def _inputs(work: Workload) -> float:
    shape = work.model.shape
    return float(work.element_bytes * shape.hidden_size * shape.layers * work.tokens)


def _scores(work: Workload) -> float:
    """Return the scores of a layer: each token of a worker's share against the whole row, in every head."""
    return float(work.tokens) * work.model.shape.heads * work.length_tokens


def _layer(work: Workload, saves_all: bool) -> float:
    """Return the bytes of a layer's activations, without scores.

    A token has (18 h + 4 q + 8 kv + 8 i + 4 a) bytes in 16 bits: two norms with their fp32 copies, inputs and
    outputs of products, queries and keys before and after rotation, the gate, what it lets through, the last
    product's input, and the softmax's statistics. A frozen product with no adapter saves no input.
    """
    shape = work.model.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    part = work.mlp_tile_tokens / work.tokens if 0 < work.mlp_tile_tokens < work.tokens else 1.0
    inner = (8 if shape.mlp_matrices == 3 else 4) * shape.intermediate_size
    outer = 18 * shape.hidden_size + 4 * queries + 8 * keys + 4 * shape.heads
    if not saves_all and work.method == "lora":
        beside = {each.name for each in work.adapted_linears}
        for each in work.model.parameters.linears:
            if each.name not in beside and each.name not in _SHARED_INPUTS:
                outer -= (
                    2 * each.inputs if each.part == "attention" or each.inputs == shape.hidden_size else 0
                )
                inner -= 2 * each.inputs if each.part == "mlp" and each.inputs != shape.hidden_size else 0
    return work.element_bytes / 2 * work.tokens * (outer + part * inner)


_SHARED_INPUTS = frozenset({"k_proj", "v_proj", "up_proj", "w2", "w3"})
"""Products whose input another one saves too."""


def _products(work: Workload) -> float:
    """Return the bytes of what a layer's products and its attention gave."""
    outputs = sum(each.outputs for each in work.model.parameters.linears)
    shape = work.model.shape
    return float(
        work.element_bytes * work.tokens * (shape.hidden_size + outputs + shape.heads * shape.head_dim)
    )


def _gathered_params(work: Workload) -> float:
    """Return the bytes of weights that ZeRO-3 has gathered, and prefetches."""
    if work.zero_stage < 3:
        return 0.0
    total = work.model.parameters.total
    return float(
        work.element_bytes
        * (min(LIVE_PARAMETERS, total) + min(PREFETCH, total) + work.model.parameters.largest)
    )


def _buffers(work: Workload) -> float:
    if work.zero_stage == 0:  # PyTorch's DistributedDataParallel copies gradients into buckets
        return gradient_bytes(work) if work.world_size > 1 else 0.0
    return 2.0 * work.element_bytes * min(REDUCE_BUCKET, work.num_trainable_params)


def _step(work: Workload) -> float:
    """Return the bytes that the step takes: fp32 gradients, or the update of an AdamW without fp32 copies."""
    if work.offload_optimizer:
        return 0.0
    share = work.num_trainable_params / (work.world_size if work.zero_stage >= 1 else 1)
    if not (work.master_weights and work.element_bytes < 4):
        return work.element_bytes * share
    return 8.0 * min(share, SUB_GROUP) if work.zero_stage == 3 else 4.0 * share


def _reserved_gradients(work: Workload) -> float:
    """Return what ZeRO-3 is seen to hold for gradients beside their 16 bits.

    DeepSpeed's own estimator counts 18 bytes a parameter, with gradients in fp32. Its code keeps 16; the
    other two are in what Qwen's runs of full parameters had reserved.
    """
    if work.zero_stage < 3 or not work.master_weights or work.offload_optimizer or work.element_bytes == 4:
        return 0.0
    return 2.0 * (work.num_trainable_params - work.num_adapter_params) / work.world_size


def _largest_linear(work: Workload) -> float:
    return float(max(each.inputs * each.outputs for each in work.model.parameters.linears))
