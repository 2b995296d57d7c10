"""Causal attention that takes document boundaries itself: no token sees another document of its pack.

The model is built with the attention implementation `documents`, registered here with transformers. The
boundaries travel as a keyword argument of the model's forward call down to each layer; no mask is built.

On CUDA one variable-length flash call serves the whole row. Elsewhere, documents of like length are batched
into one dense causal call each. A document may be padded at its end for that: under a causal mask no real
token ever sees what comes after it, so the result is exact.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.parallel.ulysses import SequenceGroup

IMPLEMENTATION = "documents"
Kernel = Literal["flash", "sdpa"]


@dataclass(frozen=True)
class Group:
    """Documents that share one dense call: `count` of them, each padded to `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row of T tokens lie.

    Attributes:
        kernel: How attention is computed.
        bounds: Start of each document and the end of the last, int32, shape [documents + 1] (flash).
        longest: Tokens of the longest document.
        groups: Documents batched by like length (sdpa).
        gather: Row positions in the order of the groups, padding included, int64 (sdpa).
        scatter: For each of the T positions its place in `gather`, int64, shape [T] (sdpa).
        sequence: The workers that share the row; None where this one holds it alone.
    """

    kernel: Kernel
    bounds: Tensor
    longest: int
    groups: tuple[Group, ...]
    gather: Tensor
    scatter: Tensor
    sequence: SequenceGroup | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        kernel: Kernel,
        device: torch.device,
        sequence: SequenceGroup | None = None,
    ) -> Documents:
        """Prepare a row whose documents have these lengths, in order; they sum to the slots of the row."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=bounds[1:])
        groups: tuple[Group, ...] = ()
        gather = scatter = torch.zeros(0, dtype=torch.int64)
        if kernel == "sdpa":
            groups, gather, scatter = _group(sizes, bounds)
        return cls(
            kernel,
            bounds.to(device, torch.int32),
            max(lengths),
            groups,
            gather.to(device),
            scatter.to(device),
            sequence,
        )


def _group(sizes: Tensor, bounds: Tensor) -> tuple[tuple[Group, ...], Tensor, Tensor]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, size in enumerate(sizes.tolist()):
        by_length[_rounded(size)].append(number)
    groups, pieces = [], []
    scatter = torch.empty(int(bounds[-1]), dtype=torch.int64)
    at = 0
    for length, members in sorted(by_length.items()):
        chosen = torch.tensor(members)
        places = torch.arange(length)
        # Padding repeats the document's last position; what is computed there is never read.
        inside = torch.minimum(places, sizes[chosen, None] - 1) + bounds[chosen, None]
        real = places < sizes[chosen, None]
        where = at + torch.arange(inside.numel()).view_as(inside)
        scatter[inside[real]] = where[real]
        groups.append(Group(len(members), length))
        pieces.append(inside.flatten())
        at += inside.numel()
    return tuple(groups), torch.cat(pieces), scatter


def _rounded(length: int) -> int:
    """Round a length up by at most an eighth, so that fewer, larger calls remain."""
    grain = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // grain) * grain


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document, in the form in which transformers calls an attention function.

    Args:
        module: The layer that calls; only named in errors.
        query: Shape [1, heads, T, head_dim]; T is this worker's part of the row, if several share it.
        key: Shape [1, kv_heads, T, head_dim]; heads is a multiple of kv_heads.
        value: As key; its head_dim may differ, and is that of the output.
        attention_mask: Must be None; boundaries come from `documents`.
        scaling: Factor of the scores; None means head_dim ** -0.5.
        dropout: Probability of dropping an attention weight.
        documents: The boundaries.
        **kwargs: What the model passes besides; variants of attention that are not supported are refused.

    Returns:
        Output of shape [1, T, heads, head_dim], and None for the weights.

    Raises:
        ValueError: The architecture does not hand boundaries down, or wants a variant that is not supported.
    """
    name = type(module).__name__
    if documents is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"{name} does not hand document boundaries down to its attention, so packed documents would see "
            "each other; this architecture is not supported"
        )
    for kind, window in (("sliding window", kwargs.get("sliding_window")), ("chunk", _chunk(module))):
        if window is not None and window < documents.longest:
            raise ValueError(
                f"{name} has a {kind} of {window} tokens, and a document has {documents.longest}; "
                f"use data.max_length of at most {window}"
            )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{name} caps its scores or has attention sinks, which this attention does not compute"
        )
    attend = _flash if documents.kernel == "flash" else _dense
    sequence = documents.sequence
    if sequence is None:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attend(q, k, v, documents, scaling, dropout).unsqueeze(0), None
    q, k, v = (sequence.to_heads(tensor) for tensor in (query, key, value))
    return sequence.to_sequence(attend(q, k, v, documents, scaling, dropout)).unsqueeze(0), None


def _chunk(module: nn.Module) -> int | None:
    """Return the size of the chunks that a layer attends within (Llama 4); only its configuration has it."""
    size: int | None = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    return size


def _dense(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scaling: float | None, dropout: float
) -> Tensor:
    q, k, v = (tensor.index_select(0, documents.gather) for tensor in (q, k, v))
    outputs = []
    at = 0
    for group in documents.groups:
        size = group.count * group.length
        queries, keys, values = (
            tensor[at : at + size].view(group.count, group.length, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q, k, v)
        )
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        at += size
    return torch.cat(outputs).index_select(0, documents.scatter)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scaling: float | None, dropout: float
) -> Tensor:
    bounds, longest = documents.bounds, documents.longest
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        attended: Tensor = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True
        )
        return attended
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(
            f"attention dropout {dropout} needs the package flash-attn; install the extra `cuda`"
        )
    grouped = q.shape[1] != k.shape[1]
    result = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest,
        scale=scaling, window_size=(-1, 0), enable_gqa=grouped,
    )  # fmt: skip
    return result if isinstance(result, Tensor) else result[0]


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def kernel_for(wanted: Literal["auto", "flash", "sdpa"], device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel that is used: flash takes bf16 and fp16 on CUDA devices of capability 8.0 and up."""
    if wanted != "auto":
        return wanted
    able = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash" if able and torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def register() -> None:
    """Make `documents` known to transformers, as attention and as a mask that is never built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, document_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Stand where transformers would build a mask of T x T."""
