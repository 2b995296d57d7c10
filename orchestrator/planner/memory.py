"""Predicts the memory of a training step by component, on the GPU and on the host, from tensor sizes.

Formulas follow ZeRO (arXiv 1910.02054) for model states, Korthikanti et al. (arXiv 2205.05198) for
activations, extended to RMSNorm, SwiGLU and grouped-query attention, QLoRA (arXiv 2305.14314) and GPTQ (arXiv
2210.17323) for quantized weights, and DeepSpeed 0.19 for buffers. The loss, the backward pass of a layer and
the optimizer step do not overlap, so the peak is the maximum of the three.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from orchestrator.arch.parameters import ParameterCount
from orchestrator.planner.host_memory import HostMemory, offloaded
from orchestrator.planner.workload import Quantization, Workload

GIB = 2**30
CONTEXT_BYTES = 0.6 * GIB
"""Memory of the CUDA context, cuBLAS and kernels before the first tensor: 0.4 to 0.8 GiB in nvidia-smi."""
COLLECTIVES_BYTES = 1.0 * GIB
"""Memory of NCCL channels and stream workspaces with more than one worker."""
BITS: dict[Quantization, float] = {
    "none": 16.0,
    "nf4": 4.127,
    "int8": 8.08,
    "gptq-int4": 4.16,
    "gptq-int8": 8.16,
}
"""Bits per weight, including scales: nf4 in blocks of 64 with double quantization, int8 with one scale per
row, GPTQ in groups of 128 with a 16-bit scale and a zero point."""
SCORE_BYTES = 17.0
"""Bytes per attention score in the softmax backward pass of eager attention: probabilities in fp32 and 16
bits (6), their gradients (6) and the gradients of the scores (6), less what autograd frees meanwhile (1)."""
KEPT_SCORE_BYTES = 3.0
"""Bytes per attention score saved for the backward pass: the 16-bit probability and one byte of a mask."""
REDUCE_BUCKET = 200_000_000
"""Elements of `reduce_bucket_size` in ds_configs; allocated twice because communication overlaps."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements of `stage3_max_live_parameters` in ds_configs."""
PREFETCH = 50_000_000
"""Elements of `stage3_prefetch_bucket_size` in ds_configs."""
SUB_GROUP = 1_000_000_000
"""Elements of `sub_group_size` in ds_configs: the parameters that ZeRO-3 updates at a time."""
FRAGMENTATION = 0.75
"""Allocator fragmentation relative to activations when micro-batches vary in length; fitted to the LoRA
results of ms-swift's benchmark from 512 to 8192 tokens, with rows of 3,200 tokens on average."""

RETAINED = 0.4
"""Fraction of the smaller of forward/backward and step memory that stays reserved, because the larger phase
cannot reuse blocks of other sizes; fitted to the six full-parameter results of ms-swift's benchmark."""


@dataclass(frozen=True)
class GpuMemory:
    """GPU memory of a worker by component, in bytes, each at its own peak.

    Attributes:
        weights: Resident weights; quantized weights in their storage dtype.
        gradients: Gradients held between micro-batches.
        optimizer: Optimizer states and fp32 master weights.
        gathered_params: Parameters gathered by ZeRO-3.
        buffers: Gradient reduction buckets.
        activations: Activations saved by the forward pass for the backward pass.
        layer: Activations of one layer during its recomputation and backward pass.
        logits: Logits and the temporaries of the loss.
        step: Temporaries of the optimizer step.
        quantization: A weight dequantized for a matmul.
        context: CUDA context and NCCL.
        fragmentation: Allocator fragmentation when sequence lengths vary.
        retained: Reserved but unused memory: of the smaller of forward/backward and step, and of ZeRO-3
            gradients.
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
        """Memory held throughout forward, backward and step, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.context

    @property
    def loss_peak(self) -> float:
        """Memory during the loss, when the activations of all layers are saved, in bytes."""
        return self.states + self.gathered_params + self.activations + self.logits

    @property
    def backward_peak(self) -> float:
        """Memory during the backward pass of a layer, in bytes."""
        return self.states + self.gathered_params + self.activations + self.layer + self.quantization

    @property
    def step_peak(self) -> float:
        """Memory during the optimizer step, in bytes; the last parameters ZeRO-3 gathered may remain."""
        return self.states + self.gathered_params + self.step

    @property
    def required(self) -> float:
        """Peak of allocated memory in bytes: a GPU with less memory runs out of memory."""
        return max(self.loss_peak, self.backward_peak, self.step_peak)

    @property
    def peak(self) -> float:
        """Peak of reserved memory in bytes, including fragmentation."""
        forward = max(self.loss_peak, self.backward_peak) + self.fragmentation
        return max(forward, self.step_peak) + self.retained

    def by_part(self) -> dict[str, float]:
        """Return the bytes of every component by field name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def gpu_memory(
    work: Workload, context_bytes: float = CONTEXT_BYTES, collectives_bytes: float = COLLECTIVES_BYTES
) -> GpuMemory:
    """Return the GPU memory of a worker.

    Args:
        work: The workload.
        context_bytes: Memory of the CUDA context; 0 to compare with torch's memory statistics.
        collectives_bytes: Memory of NCCL, added if there is more than one worker and a context.
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
    """Return the host memory that a worker needs for offloaded states and activations.

    Args:
        work: The workload.
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
    """Return the bytes of weights resident on a worker's GPU, including adapters."""
    found, size = work.model.parameters, float(work.element_bytes)
    linears = float(found.layers * found.matrices_per_layer)
    rest = found.total - linears
    if work.quantization == "none":
        base = size * (linears + rest)
    else:
        bitsandbytes = work.quantization in ("nf4", "int8")
        base = BITS[work.quantization] / 8 * linears
        base += (4.0 if bitsandbytes and work.casts_frozen_to_fp32 else size) * rest
    adapters = work.adapter_bytes * work.num_adapter_params + size * work.num_copied_params
    if work.zero_stage < 3:
        return base + adapters
    return 0.0 if work.offload_param else (base + adapters) / work.world_size


def gradient_bytes(work: Workload) -> float:
    """Return the bytes of gradients that stay on the GPU between micro-batches.

    ZeRO-1 keeps full gradients; ZeRO-2 and 3 partition them, and with an offloaded optimizer move them to the
    host after each micro-batch.
    """
    if work.offload_optimizer and work.zero_stage >= 2:
        return 0.0
    size = work.adapter_bytes * work.num_adapter_params + work.element_bytes * (
        work.num_trainable_params - work.num_adapter_params
    )
    return float(size) / (work.world_size if work.zero_stage >= 2 else 1)


def optimizer_bytes(work: Workload) -> float:
    """Return the bytes of optimizer states and master weights over all workers, on GPU or host."""
    wide = work.num_adapter_params if work.adapter_bytes == 4 else 0
    narrow = work.num_trainable_params - wide
    # ZeRO keeps a copy of its partition even when the weights are already fp32.
    partition = 4.0 if work.zero_stage >= 1 else 0.0
    copies = 4.0 if work.master_weights else 0.0
    # Without master weights Adam's moments have the dtype of the weights.
    moments = work.optimizer_bytes if copies or work.element_bytes == 4 else work.optimizer_bytes / 2
    copies = partition if work.element_bytes == 4 else copies
    return (moments + copies) * narrow + (work.optimizer_bytes + partition) * wide


def kept_bytes(work: Workload) -> float:
    """Return the bytes of activations that the forward pass saves on the GPU for the backward pass."""
    layers = work.model.shape.layers
    if work.checkpointing == "full":
        inputs = _inputs(work)
        # With offloading the inputs of two layers are on the GPU at a time.
        return 2 * inputs / layers if work.offload_activations else inputs
    scores = 0.0 if work.flash else KEPT_SCORE_BYTES * _scores(work)
    if work.checkpointing == "selective":
        return layers * (_products(work) + scores)
    return layers * (_layer(work, saves_all=False) + scores)


def layer_bytes(work: Workload) -> float:
    """Return the bytes of one layer's activations in its backward pass; gradients reuse their memory."""
    scores = 0.0 if work.flash else SCORE_BYTES * _scores(work)
    return _layer(work, saves_all=True) + scores


def loss_bytes(work: Workload) -> float:
    """Return the bytes of logits and loss: of all tokens, or of one tile with `loss_tile_tokens`."""
    scored = work.tokens * work.largest_labelled_share
    tokens = min(scored, work.loss_tile_tokens) if work.loss_tile_tokens else scored
    # A tiled loss also holds hidden states [tokens, hidden_size] and their gradient.
    tiled = (
        2.0 * work.element_bytes * work.model.shape.hidden_size * work.tokens
        if work.loss_tile_tokens
        else 0.0
    )
    return work.logit_bytes * work.element_bytes / 2 * work.model.shape.vocab_size * tokens + tiled


def _inputs(work: Workload) -> float:
    """Return the bytes of the inputs [tokens, hidden_size] of all layers."""
    shape = work.model.shape
    return float(work.element_bytes * shape.hidden_size * shape.layers * work.tokens)


def _scores(work: Workload) -> float:
    """Return the number of attention scores of a layer: [heads, tokens of the worker, length of the row]."""
    return float(work.tokens) * work.model.shape.heads * work.length_tokens


def _layer(work: Workload, saves_all: bool) -> float:
    """Return the bytes of a layer's activations, without attention scores.

    In a 16-bit dtype a token takes 18 h + 4 q + 8 kv + 8 i + 4 a bytes, with h = hidden_size, q = heads x
    head_dim, kv = kv_heads x head_dim, i = intermediate_size and a = heads: two norms with fp32 copies,
    inputs and outputs of matmuls, queries and keys before and after RoPE, the MLP's gate, up projection,
    activation and input of the down projection, and the softmax statistics of FlashAttention.

    Args:
        work: The workload.
        saves_all: Whether every matmul saves its input. If False, a frozen linear layer without an adapter
            saves none, because its weight has no gradient.
    """
    shape = work.model.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # With a tiled MLP only one tile of the intermediate activations [tokens, intermediate_size] exists.
    part = work.mlp_tile_tokens / work.tokens if 0 < work.mlp_tile_tokens < work.tokens else 1.0
    inner = (8 if shape.mlp_matrices == 3 else 4) * shape.intermediate_size
    outer = 18 * shape.hidden_size + 4 * queries + 8 * keys + 4 * shape.heads
    if not saves_all and work.method == "lora":
        adapted = {each.name for each in work.adapted_linears}
        for each in work.model.parameters.linears:
            if each.name not in adapted and each.name not in _SHARED_INPUTS:
                outer -= (
                    2 * each.inputs if each.part == "attention" or each.inputs == shape.hidden_size else 0
                )
                inner -= 2 * each.inputs if each.part == "mlp" and each.inputs != shape.hidden_size else 0
    return work.element_bytes / 2 * work.tokens * (outer + part * inner)


_SHARED_INPUTS = frozenset({"k_proj", "v_proj", "up_proj", "w2", "w3"})
"""Linear layers whose input tensor is also the input of another linear layer, so it is counted once."""


def _products(work: Workload) -> float:
    """Return the bytes of a layer's matmul and attention outputs and its input, as `selective` saves them."""
    outputs = sum(each.outputs for each in work.model.parameters.linears)
    shape = work.model.shape
    return float(
        work.element_bytes * work.tokens * (shape.hidden_size + outputs + shape.heads * shape.head_dim)
    )


def _gathered_params(work: Workload) -> float:
    """Return the bytes of parameters that ZeRO-3 has gathered and prefetched."""
    if work.zero_stage < 3:
        return 0.0
    total = work.model.parameters.total
    return float(
        work.element_bytes
        * (min(LIVE_PARAMETERS, total) + min(PREFETCH, total) + work.model.parameters.largest)
    )


def _buffers(work: Workload) -> float:
    """Return the bytes of gradient reduction buckets."""
    if work.zero_stage == 0:  # DistributedDataParallel copies gradients into buckets
        return gradient_bytes(work) if work.world_size > 1 else 0.0
    return 2.0 * work.element_bytes * min(REDUCE_BUCKET, work.num_trainable_params)


def _step(work: Workload) -> float:
    """Return the bytes of temporaries of the optimizer step.

    These are fp32 gradients of the partition with master weights, and otherwise the update of AdamW.
    """
    if work.offload_optimizer:
        return 0.0
    share = work.num_trainable_params / (work.world_size if work.zero_stage >= 1 else 1)
    if not (work.master_weights and work.element_bytes < 4):
        return work.element_bytes * share
    return 8.0 * min(share, SUB_GROUP) if work.zero_stage == 3 else 4.0 * share


def _reserved_gradients(work: Workload) -> float:
    """Return the bytes that ZeRO-3 reserves for gradients in addition to 16 bits per parameter.

    DeepSpeed's estimator counts 18 bytes per parameter, with fp32 gradients, while its code allocates 16. The
    other two bytes appear in the reserved memory of Qwen's full-parameter runs.
    """
    if work.zero_stage < 3 or not work.master_weights or work.offload_optimizer or work.element_bytes == 4:
        return 0.0
    return 2.0 * (work.num_trainable_params - work.num_adapter_params) / work.world_size


def _largest_linear(work: Workload) -> float:
    """Return the number of weights of the largest linear layer."""
    return float(max(each.inputs * each.outputs for each in work.model.parameters.linears))
