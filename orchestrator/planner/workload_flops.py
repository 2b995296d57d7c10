"""FLOPs of a worker's micro-batch, by the formulas of `orchestrator.arch.flops` that the metrics use too."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.arch.flops import (
    ForwardFlops,
    FrozenWeights,
    Recomputation,
    forward_flops,
    hardware_flops,
    model_flops,
    square_in_window,
)
from orchestrator.planner.workload import Workload


def micro_batch_forward_flops(work: Workload) -> ForwardFlops:
    """Return the FLOPs of one forward pass over a worker's micro-batch."""
    seen = work.attended_tokens  # the micro-batch is modelled as tokens / seen documents of this length
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

    Recomputation includes the last matmul of a layer, because `LINEAR_EFFICIENCY` was fitted that way.
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
