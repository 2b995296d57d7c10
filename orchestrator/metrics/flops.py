"""Floating-point operations of the work that was asked for, and of the work that was done.

A matrix product of [m, k] and [k, n] counts 2 m k n. Attention is causal and stays inside documents, so a
document of length L costs 2 d heads L^2 a layer for scores and values together, half of the full square. The
backward pass costs twice the forward pass (Megatron-LM, arXiv 2104.04473; PaLM's MFU, arXiv 2204.02311).
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.plan.shape import ModelShape


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass by part.

    Attributes:
        linear: Products with the layers' weights.
        attention: Scores and values.
        head: The LM head.
        last_product: The part of `linear` that ends each layer, the MLP's way back to the hidden size.
    """

    linear: float
    attention: float
    head: float
    last_product: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return self.linear + self.attention + self.head


def forward_flops(shape: ModelShape, tokens: int, square_tokens: float, scored_tokens: int) -> ForwardFlops:
    """Return the FLOPs of one forward pass.

    Args:
        shape: The model.
        tokens: Real tokens, T.
        square_tokens: Sum of squared document lengths.
        scored_tokens: Positions at which the LM head is computed.
    """
    return ForwardFlops(
        linear=2.0 * shape.layers * shape.linear_parameters_per_layer * tokens,
        attention=2.0 * shape.layers * shape.heads * shape.head_dim * square_tokens,
        head=2.0 * shape.hidden_size * shape.vocab_size * scored_tokens,
        last_product=2.0 * shape.layers * shape.hidden_size * shape.intermediate_size * tokens,
    )


def model_flops(forward: ForwardFlops) -> float:
    """Return the FLOPs of a training step that the model asks for: `tflops_model` counts these."""
    return 3.0 * forward.total


def hardware_flops(
    forward: ForwardFlops, gradient_checkpointing: bool, zero_stage: int, tiled_head: bool = False
) -> float:
    """Return the FLOPs that are done, with what gradient checkpointing recomputes.

    Torch stops recomputing a layer before its last product, whose output no gradient needs. ZeRO-3 wraps each
    product in a function that saves its inputs, and so does that one as well.

    Args:
        forward: One forward pass.
        gradient_checkpointing: Whether each layer is recomputed.
        zero_stage: Stage of ZeRO, or 0 without DeepSpeed.
        tiled_head: Whether the LM head computes its logits again.
    """
    done = model_flops(forward) + (forward.head if tiled_head else 0.0)
    if not gradient_checkpointing:
        return done
    recomputed = forward.linear + forward.attention
    return done + recomputed - (0.0 if zero_stage == 3 else forward.last_product)
