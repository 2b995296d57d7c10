"""The `sdpa` backend: causal attention over a batch of sequences of equal length T without a flash kernel.

Sliding-window attention and logit softcapping are computed per block of queries, with only the keys that the
block can see. A window then costs O(T * window) instead of O(T^2), and no mask or score matrix has shape
[T, T].
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
    """Options of causal attention.

    Attributes:
        scaling: Factor of the attention scores; None means head_dim ** -0.5.
        dropout: Dropout probability of attention weights.
        window: Sliding window in tokens, including the query itself; None means no window.
        softcap: Scores s become softcap * tanh(s / softcap), after `scaling`; None disables softcapping.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


def attend(queries: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """Compute causal attention over sequences of equal length.

    Args:
        queries: Shape [sequences, heads, length, head_dim].
        keys: Shape [sequences, kv_heads, length, head_dim]; heads is a multiple of kv_heads.
        values: Shape [sequences, kv_heads, length, value_dim].
        options: Scaling, dropout, window and softcap.

    Returns:
        Tensor of shape [sequences, heads, length, value_dim].
    """
    length = queries.shape[2]
    window = length if options.window is None else min(options.window, length)
    if options.softcap is None and window == length:
        return _fused(queries, keys, values, None, options)
    # Split the queries into blocks [sequences, heads, block, head_dim]; more sequences give smaller blocks,
    # so that one block has about _QUERIES_AT_ONCE queries in total.
    block = max(_LEAST_BLOCK, _QUERIES_AT_ONCE // len(queries))
    earlier = -(-(window - 1) // block)  # key blocks before the query's own that its window can reach into
    query_blocks, key_blocks, value_blocks = (
        torch.split(tensor, block, dim=2) for tensor in (queries, keys, values)
    )
    outputs = []
    for number, chosen in enumerate(query_blocks):
        start = max(0, number - earlier)
        k, v = (torch.cat(blocks[start : number + 1], dim=2) for blocks in (key_blocks, value_blocks))
        # behind[q, k] is the distance in tokens from key k back to query q, shape [block, keys]; negative for
        # keys after the query. Both indices count from the first key of k.
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
    """Checkpoint `_capped`: recompute the scores of a block in the backward pass instead of saving them.

    Without this, all blocks together would save sequences x heads x length x window scores.
    """
    keeps_noise = options.dropout > 0
    attended: Tensor = checkpoint(
        _capped, q, k, v, visible, options, cap, use_reentrant=False, preserve_rng_state=keeps_noise
    )
    return attended


def _capped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, options: AttentionOptions, cap: float
) -> Tensor:
    """Compute attention with softcapped scores, which torch's fused kernels do not support.

    Args:
        q: Queries of one block, shape [sequences, heads, block, head_dim].
        k: Keys, shape [sequences, kv_heads, keys, head_dim].
        v: Values, shape [sequences, kv_heads, keys, value_dim].
        visible: Attention mask, shape [block, keys]; True where a query sees a key.
        options: Scaling and dropout.
        cap: The softcap.

    Returns:
        Tensor of shape [sequences, heads, block, value_dim].
    """
    scaling = q.shape[3] ** -0.5 if options.scaling is None else options.scaling
    # Grouped-query attention without repeating keys: fold the query heads that share a KV head into its rows.
    # groups = (sequences, kv_heads, heads / kv_heads, block); rows: [sequences, kv_heads, group * block, d].
    groups = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    rows = q.reshape(*groups, q.shape[3]).flatten(2, 3)
    # The matmul is in q.dtype; scaling, softcap and softmax are in at least fp32.
    scores = (rows @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    scores = (torch.tanh(scores / cap) * cap).view(*groups, k.shape[2])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(q.dtype)
    weights = functional.dropout(weights, options.dropout)
    return (weights.flatten(2, 3) @ v).view(*groups, v.shape[3]).flatten(1, 2)
