"""Floating-point operations of the work that was asked for, and of the work that was done.

A matrix product of [m, k] and [k, n] counts 2 m k n. Attention is causal and stays inside documents, so a
document of length L costs 2 d heads L^2 a layer for scores and values together, half of the full square; in a
layer with a sliding window w < L only the band of the square that is seen counts, 2 w L - w^2 for L^2. The
backward pass costs twice the forward pass (Megatron-LM, arXiv 2104.04473; PaLM's MFU, arXiv 2204.02311),
and once where a weight is frozen, which needs no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.arch.model_dims import ModelDims


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass by part.

    Attributes:
        linear: Products with the layers' weights.
        attention: Scores and values.
        head: The LM head.
        last_matmul: The part of `linear` that ends each layer, the MLP's way back to the hidden size.
        adapters: Products with the matrices of LoRA.
        mlp_matmuls: Products of an MLP, each as large as the last.
    """

    linear: float
    attention: float
    head: float
    last_matmul: float = 0.0
    adapters: float = 0.0
    mlp_matmuls: int = 3

    @property
    def total(self) -> float:
        """All parts together."""
        return self.linear + self.attention + self.head + self.adapters

    @property
    def mlp(self) -> float:
        """The part of `linear` in the MLPs, whose matrices are of one size."""
        return self.mlp_matmuls * self.last_matmul


def square_in_window(length: float, window: int) -> float:
    """Return how much of the square of a document's length a layer with a sliding window computes.

    Args:
        length: Tokens of the document, L.
        window: Tokens that a token attends to, itself included, w; 2 w L - w^2 where the document is longer.
    """
    return length * length if length <= window else 2 * window * length - window * window


def squares_in_window(lengths: Iterable[int], window: int) -> float:
    """Return the part of the documents' squared lengths that a layer with a sliding window computes."""
    return float(sum(square_in_window(length, window) for length in lengths))


def forward_flops(
    shape: ModelDims,
    tokens: float,
    square_tokens: float,
    scored_tokens: float,
    window_square_tokens: float | None = None,
    num_adapter_params: int = 0,
) -> ForwardFlops:
    """Return the FLOPs of one forward pass.

    Args:
        shape: The model.
        tokens: Real tokens, T.
        square_tokens: Sum of squared document lengths.
        scored_tokens: Positions at which the LM head is computed.
        window_square_tokens: The same sum for sliding-window layers, from `squares_in_window`; None if no
            document is longer than the window.
        num_adapter_params: Weights of all matrices of LoRA in the layers.
    """
    windowed = square_tokens if window_square_tokens is None else window_square_tokens
    full_layers = shape.layers - shape.sliding_window_layers
    seen = full_layers * square_tokens + shape.sliding_window_layers * windowed
    return ForwardFlops(
        linear=2.0 * shape.layers * shape.linear_parameters_per_layer * tokens,
        attention=2.0 * shape.heads * shape.head_dim * seen,
        head=2.0 * shape.hidden_size * shape.vocab_size * scored_tokens,
        last_matmul=2.0 * shape.layers * shape.hidden_size * shape.intermediate_size * tokens,
        adapters=2.0 * num_adapter_params * tokens,
        mlp_matmuls=shape.mlp_matrices,
    )


@dataclass(frozen=True)
class FrozenWeights:
    """Which weights need no gradient.

    Attributes:
        layers: Those of the layers.
        head: That of the LM head.
    """

    layers: bool = False
    head: bool = False


def model_flops(forward: ForwardFlops, frozen: FrozenWeights = FrozenWeights()) -> float:
    """Return the FLOPs of a training step that the model asks for: `tflops_model` counts these."""
    spared = (forward.linear if frozen.layers else 0.0) + (forward.head if frozen.head else 0.0)
    return 3.0 * forward.total - spared


@dataclass(frozen=True)
class Recomputation:
    """What a training step computes again instead of keeping it.

    Attributes:
        checkpointing: `full` recomputes each layer; `selective` no matrix product and no attention.
        zero_stage: Stage of ZeRO, or 0 without DeepSpeed.
        tiled_head: Whether the LM head computes its logits again.
        mlp_tiles: Tiles of a micro-batch that each MLP runs on; 0 where it runs on all at once.
        adapts_last_matmul: Whether an adapter stands beside the last product of a layer.
        whole_layers: Whether to count the last product of a recomputed layer even where torch skips it.
    """

    checkpointing: Literal["full", "selective", "none"] = "none"
    zero_stage: int = 0
    tiled_head: bool = False
    mlp_tiles: int = 0
    adapts_last_matmul: bool = False
    whole_layers: bool = False


def hardware_flops(
    forward: ForwardFlops, again: Recomputation, frozen: FrozenWeights = FrozenWeights()
) -> float:
    """Return the FLOPs that are done, with those that are done again.

    Torch stops recomputing as soon as it has all that a gradient needs: before the last product of a layer,
    or of a tile, whose output no gradient needs; and before the last tile, which its own backward pass
    recomputes. ZeRO-3 wraps each product in a function that saves its inputs, and so does the last one too;
    an adapter runs after the product that it stands beside, and needs its input. Where layers are not
    recomputed, the first one's input needs no gradient if it is frozen; that is counted nevertheless.

    Args:
        forward: One forward pass.
        again: What is recomputed.
        frozen: Which weights need no gradient.
    """
    done = model_flops(forward, frozen) + (forward.head if again.tiled_head else 0.0)
    keeps_last = again.zero_stage == 3 or again.adapts_last_matmul or again.whole_layers
    skipped = 0.0 if keeps_last else forward.last_matmul
    if again.mlp_tiles:
        done += forward.mlp - skipped
        skipped = forward.mlp / again.mlp_tiles
    if again.checkpointing == "full":
        done += forward.linear + forward.attention + forward.adapters - skipped
    return done


def flops_per_token_xtuner(
    shape: ModelDims,
    sequence_tokens: int,
    causal: bool = True,
    checkpointing: bool = True,
) -> float:
    """Return the FLOPs of a token by XTuner's formula, only for tables beside those that XTuner printed.

    It counts attention over the whole sequence, as many key and value heads as query heads, a recomputed
    forward pass, and logits everywhere. For a GPU's share of s = S / sp tokens, with r = 1.5 i / h, its
    ThroughputHook has
    (3 + ac) l [8 s h^2 + 4 s^2 h sp / (1 + causal) + 4 r s h^2] + 6 s h V; divided by s, sp is in S alone.

    Args:
        shape: The model.
        sequence_tokens: Tokens of a sequence over all workers that share it, S.
        causal: Whether only half of the attention is counted.
        checkpointing: Whether the forward pass of the layers is counted again, ac.
    """
    hidden = float(shape.hidden_size)
    ratio = 1.5 * shape.intermediate_size / hidden
    attention = 4.0 * sequence_tokens * hidden / (2.0 if causal else 1.0)
    layer = 8.0 * hidden**2 + attention + 4.0 * ratio * hidden**2
    passes = 4.0 if checkpointing else 3.0
    return passes * shape.layers * layer + 6.0 * hidden * shape.vocab_size
