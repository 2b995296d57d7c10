"""Causal attention over a batch of sequences of one length, where no flash kernel is at hand.

A sliding window and capped scores are computed a block of queries at a time, each with the keys that it can
see. So a window costs T x window and not T x T, and no mask or matrix of scores grows with the square of the
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_QUERIES_AT_ONCE = 512
_LEAST_BLOCK = 64


@dataclass(frozen=True)
class AttentionOptions:
    """How a query weighs the keys before it.

    Attributes:
        scaling: Factor of the scores; None means head_dim ** -0.5.
        dropout: Probability of dropping a weight.
        window: Tokens that a token sees, itself included; None means all before it.
        softcap: Scores s become softcap * tanh(s / softcap), after `scaling`; None leaves them.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


def attend(queries: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """Return causal attention of sequences of one length.

    Args:
        queries: Shape [sequences, heads, length, head_dim].
        keys: Shape [sequences, kv_heads, length, head_dim]; heads is a multiple of kv_heads.
        values: As keys; head_dim may differ.
        options: How keys are weighed.

    Returns:
        Shape [sequences, heads, length, head_dim of the values].
    """
    length = queries.shape[2]
    window = length if options.window is None else min(options.window, length)
    if options.softcap is None and window == length:
        return _fused(queries, keys, values, None, options)
    block = max(_LEAST_BLOCK, _QUERIES_AT_ONCE // len(queries))
    earlier = -(-(window - 1) // block)  # blocks before its own that a query may see into
    query_blocks, key_blocks, value_blocks = (
        torch.split(tensor, block, dim=2) for tensor in (queries, keys, values)
    )
    outputs = []
    for number, chosen in enumerate(query_blocks):
        start = max(0, number - earlier)
        k, v = (torch.cat(blocks[start : number + 1], dim=2) for blocks in (key_blocks, value_blocks))
        # How far each key lies behind each query.
        rows = torch.arange(chosen.shape[2], device=chosen.device) + (number - start) * block
        behind = rows[:, None] - torch.arange(k.shape[2], device=chosen.device)
        visible = (behind >= 0) & (behind < window)
        if options.softcap is None:
            outputs.append(_fused(chosen, k, v, visible, options))
        else:
            outputs.append(_capped_again(chosen, k, v, visible, options, options.softcap))
    return torch.cat(outputs, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, options: AttentionOptions) -> Tensor:
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=options.scaling,
        dropout_p=options.dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _capped_again(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, options: AttentionOptions, cap: float
) -> Tensor:
    """Compute the scores of a block again in the backward pass instead of keeping those of all blocks."""
    keeps_noise = options.dropout > 0
    attended: Tensor = checkpoint(
        _capped, q, k, v, visible, options, cap, use_reentrant=False, preserve_rng_state=keeps_noise
    )
    return attended


def _capped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, options: AttentionOptions, cap: float
) -> Tensor:
    """Attend with capped scores, which no fused kernel of torch computes; softmax is in fp32 at least."""
    scaling = q.shape[3] ** -0.5 if options.scaling is None else options.scaling
    groups = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2])  # third: heads that share keys
    rows = q.reshape(*groups, q.shape[3]).flatten(2, 3)
    scores = (rows @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    scores = (torch.tanh(scores / cap) * cap).view(*groups, k.shape[2])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(q.dtype)
    weights = functional.dropout(weights, options.dropout)
    return (weights.flatten(2, 3) @ v).view(*groups, v.shape[3]).flatten(1, 2)
