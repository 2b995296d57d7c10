"""Model FLOPs and hardware FLOPs (with recomputation) of a training step.

A matmul of [m, k] and [k, n] counts 2 m k n. Attention is causal within each document, so a document of L
tokens costs 2 * head_dim * heads * L^2 per layer for scores and values together, half of full attention. In a
layer with a sliding window w < L, L^2 is replaced by 2 w L - w^2, the band inside the window. The backward
pass costs twice the forward pass (Megatron-LM, arXiv 2104.04473; PaLM's MFU, arXiv 2204.02311), and once the
forward pass for a frozen weight, which needs only the gradient of its input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.arch.model_dims import ModelDims


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass by part.

    Attributes:
        linear: Matmuls with the linear weights of the decoder layers.
        attention: Attention scores, and their product with the values.
        head: The LM head.
        last_matmul: The part of `linear` in the down projection of the MLP, the last matmul of each layer.
        adapters: Matmuls with LoRA matrices.
        mlp_matmuls: Matmuls per MLP, each as large as the down projection (3 if gated, else 2).
    """

    linear: float
    attention: float
    head: float
    last_matmul: float = 0.0
    adapters: float = 0.0
    mlp_matmuls: int = 3

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.linear + self.attention + self.head + self.adapters

    @property
    def mlp(self) -> float:
        """The part of `linear` in the MLPs; all matrices of an MLP have the same size."""
        return self.mlp_matmuls * self.last_matmul


def square_in_window(length: float, window: int) -> float:
    """Return the part of L^2 that a sliding-window layer computes: L^2 if L <= w, else 2 w L - w^2.

    Args:
        length: Tokens of the document, L.
        window: Tokens that a token attends to, including itself, w.
    """
    return length * length if length <= window else 2 * window * length - window * window


def squares_in_window(lengths: Iterable[int], window: int) -> float:
    """Return the sum of `square_in_window` over documents of the given lengths."""
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
        shape: Sizes of the model.
        tokens: Tokens without padding, T.
        square_tokens: Sum of squared document lengths, in tokens^2.
        scored_tokens: Positions at which the LM head is computed.
        window_square_tokens: The sum for sliding-window layers, from `squares_in_window`; None if no document
            is longer than the window.
        num_adapter_params: Elements of all LoRA matrices in the decoder layers.
    """
    windowed = square_tokens if window_square_tokens is None else window_square_tokens
    full_layers = shape.layers - shape.sliding_window_layers
    # Sum of L^2 over documents and layers. Per head, the matmuls with keys and with values cost 2 d L^2 each;
    # the causal half of both together is 2 d L^2.
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
    """Which weights are frozen, so that no weight gradient is computed.

    Attributes:
        layers: Whether the linear weights of the decoder layers are frozen.
        head: Whether the weight of the LM head is frozen.
    """

    layers: bool = False
    head: bool = False


def model_flops(forward: ForwardFlops, frozen: FrozenWeights = FrozenWeights()) -> float:
    """Return the FLOPs of a training step without recomputation; `tflops_model` is computed from these."""
    # Forward pass, input gradients and weight gradients cost the same each; frozen weights omit the last.
    spared = (forward.linear if frozen.layers else 0.0) + (forward.head if frozen.head else 0.0)
    return 3.0 * forward.total - spared


@dataclass(frozen=True)
class Recomputation:
    """What a training step recomputes in its backward pass.

    Attributes:
        checkpointing: `full` recomputes each layer; `selective` recomputes no matmul and no attention.
        zero_stage: ZeRO stage, or 0 without DeepSpeed.
        tiled_head: Whether the LM head is tiled and recomputes its logits.
        mlp_tiles: Tiles per micro-batch of each MLP; 0 if MLPs are not tiled.
        adapts_last_matmul: Whether the last matmul of each layer has an adapter.
        whole_layers: Whether to count the last matmul of a recomputed layer even if torch skips it.
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
    """Return the FLOPs of a training step including recomputation; `tflops_hardware` is computed from these.

    torch stops a recomputation as soon as every saved tensor is restored. It therefore skips the last matmul
    of a layer or tile, whose output no gradient needs, and in a checkpointed layer the last tile, which the
    tile's own backward pass recomputes. Two cases do not skip the last matmul: ZeRO-3 wraps each linear in an
    autograd function that saves its inputs; and an adapter of the last matmul runs after it and saves its
    own input. If layers are frozen and not recomputed, the input of the first layer needs no gradient; this
    function counts that gradient anyway.

    Args:
        forward: FLOPs of one forward pass.
        again: What is recomputed.
        frozen: Which weights are frozen.
    """
    done = model_flops(forward, frozen) + (forward.head if again.tiled_head else 0.0)
    keeps_last = again.zero_stage == 3 or again.adapts_last_matmul or again.whole_layers
    skipped = 0.0 if keeps_last else forward.last_matmul
    if again.mlp_tiles:
        # Each tile recomputes its MLP; a checkpointed layer around them then skips the last tile, not the
        # last matmul.
        done += forward.mlp - skipped
        skipped = forward.mlp / again.mlp_tiles
    # Selective checkpointing saves every matmul and attention output, so it recomputes no counted FLOPs.
    if again.checkpointing == "full":
        done += forward.linear + forward.attention + forward.adapters - skipped
    return done


def flops_per_token_xtuner(
    shape: ModelDims,
    sequence_tokens: int,
    causal: bool = True,
    checkpointing: bool = True,
) -> float:
    """Return the FLOPs per token by XTuner's formula, for comparison with tables published by XTuner only.

    The formula counts attention over the whole sequence, as many KV heads as query heads, a recomputed
    forward pass, and logits at every position. For s = S / sp tokens per GPU, with r = 1.5 i / h, its
    ThroughputHook computes (3 + ac) l [8 s h^2 + 4 s^2 h sp / (1 + causal) + 4 r s h^2] + 6 s h V. Divided by
    s, this depends on sp only through S.

    Args:
        shape: Sizes of the model.
        sequence_tokens: Tokens of a sequence over all workers that share it, S.
        causal: Whether to count only half of full attention.
        checkpointing: Whether to count a recomputed forward pass of the layers, ac.
    """
    hidden = float(shape.hidden_size)
    ratio = 1.5 * shape.intermediate_size / hidden
    attention = 4.0 * sequence_tokens * hidden / (2.0 if causal else 1.0)
    layer = 8.0 * hidden**2 + attention + 4.0 * ratio * hidden**2
    passes = 4.0 if checkpointing else 3.0
    return passes * shape.layers * layer + 6.0 * hidden * shape.vocab_size
