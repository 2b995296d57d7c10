"""Causal attention that takes document boundaries itself: no token sees another document of its pack.

The model is built with the attention implementation `documents`, registered here with transformers. The
boundaries travel as a keyword argument of the model's forward call down to each layer; no mask is built.

On CUDA one variable-length flash call serves the whole row. Elsewhere, documents of like length are batched
into one dense causal call each. A document may be padded at its end for that: under a causal mask no real
token ever sees what comes after it, so the result is exact.

Sliding windows and capped scores are computed; whatever else a model asks of its attention is refused.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orchestrator.errors import SpecError
from orchestrator.model.sdpa import AttentionOptions, attend
from orchestrator.parallel.ulysses import SequenceGroup

IMPLEMENTATION = "documents"
AttnBackend = Literal["flash", "sdpa"]
_NOT_COMPUTED = {
    "s_aux": "attention sinks",
    "position_bias": "a bias by position",
    "head_mask": "a mask of heads",
}


@dataclass(frozen=True)
class LengthGroup:
    """Documents that share one dense call: `count` of them, each padded to `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True)
class VarlenMetadata:
    """Where the documents of a row of T tokens lie.

    Attributes:
        attn_backend: How attention is computed.
        cu_seqlens: Start of each document and the end of the last, int32, shape [documents + 1] (flash).
        max_seqlen: Tokens of the longest document.
        groups: Documents batched by like length (sdpa).
        gather: Row positions in the order of the groups, padding included, int64 (sdpa).
        scatter: For each of the T positions its place in `gather`, int64, shape [T] (sdpa).
        sequence: The workers that share the row; None where this one holds it alone.
    """

    attn_backend: AttnBackend
    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[LengthGroup, ...]
    gather: Tensor
    scatter: Tensor
    sequence: SequenceGroup | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        attn_backend: AttnBackend,
        device: torch.device,
        sequence: SequenceGroup | None = None,
    ) -> VarlenMetadata:
        """Prepare a row whose documents have these lengths, in order; they sum to the slots of the row."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=cu_seqlens[1:])
        groups: tuple[LengthGroup, ...] = ()
        gather = scatter = torch.zeros(0, dtype=torch.int64)
        if attn_backend == "sdpa":
            groups, gather, scatter = _group(sizes, cu_seqlens)
        return cls(
            attn_backend,
            cu_seqlens.to(device, torch.int32),
            max(lengths),
            groups,
            gather.to(device),
            scatter.to(device),
            sequence,
        )


def _group(sizes: Tensor, cu_seqlens: Tensor) -> tuple[tuple[LengthGroup, ...], Tensor, Tensor]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, size in enumerate(sizes.tolist()):
        by_length[_round_up(size)].append(number)
    groups, pieces = [], []
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    at = 0
    for length, members in sorted(by_length.items()):
        chosen = torch.tensor(members)
        places = torch.arange(length)
        # Padding repeats the document's last position; what is computed there is never read.
        inside = torch.minimum(places, sizes[chosen, None] - 1) + cu_seqlens[chosen, None]
        real = places < sizes[chosen, None]
        where = at + torch.arange(inside.numel()).view_as(inside)
        scatter[inside[real]] = where[real]
        groups.append(LengthGroup(len(members), length))
        pieces.append(inside.flatten())
        at += inside.numel()
    return tuple(groups), torch.cat(pieces), scatter


def _round_up(length: int) -> int:
    """Round a length up by at most an eighth, so that fewer, larger calls remain."""
    grain = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // grain) * grain


@dataclass(frozen=True)
class CausalMask:
    """Stands where transformers would build a mask of T x T, and says what that mask would let through.

    Attributes:
        window: Tokens that a token sees, itself included; None means all before it.
    """

    window: int | None

    def __getattr__(self, name: str) -> Any:
        """Tell why, where a model works on the mask itself."""
        raise AttributeError(
            f"the model asks for `{name}` of its attention mask, which is never built here; this "
            "architecture is not supported"
        )


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CausalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: VarlenMetadata | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document, in the form in which transformers calls an attention function.

    Args:
        module: The layer that calls.
        query: Shape [1, heads, T, head_dim]; T is this worker's part of the row, if several share it.
        key: Shape [1, kv_heads, T, head_dim]; heads is a multiple of kv_heads.
        value: As key; its head_dim may differ, and is that of the output.
        attention_mask: What `_mask` gave, or None; boundaries come from `documents`.
        scaling: Factor of the scores; None means head_dim ** -0.5.
        dropout: Probability of dropping an attention weight.
        documents: The boundaries.
        **kwargs: What the model passes besides: `sliding_window`, `softcap`; other variants are refused.

    Returns:
        Output of shape [1, T, heads, head_dim], and None for the weights.

    Raises:
        ValueError: The architecture does not hand boundaries down, or wants a variant that is not supported.
    """
    name = type(module).__name__
    is_masked = attention_mask is not None and not isinstance(attention_mask, CausalMask)
    if documents is None or is_masked or query.shape[0] != 1:
        raise ValueError(
            f"{name} does not hand document boundaries down to its attention, so packed documents would see "
            "each other; this architecture is not supported"
        )
    _refuse_variants(module, documents.max_seqlen, kwargs)
    window = _window(name, attention_mask, kwargs.get("sliding_window"), documents.max_seqlen)
    scoring = AttentionOptions(scaling, dropout, window, kwargs.get("softcap"))
    compute = _flash if documents.attn_backend == "flash" else _sdpa
    sequence = documents.sequence
    if sequence is None:
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return compute(q, k, v, documents, scoring).unsqueeze(0), None
    q, k, v = (sequence.to_heads(tensor) for tensor in (query, key, value))
    return sequence.to_sequence(compute(q, k, v, documents, scoring)).unsqueeze(0), None


def _refuse_variants(module: nn.Module, max_seqlen: int, options: Mapping[str, Any]) -> None:
    """Refuse what is neither computed here nor without effect on documents of this length."""
    name = type(module).__name__
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)  # Llama 4
    if chunk is not None and chunk < max_seqlen:
        raise ValueError(
            f"{name} attends in chunks of {chunk} tokens, but a document has {max_seqlen}; set "
            f"data.max_length to at most {chunk}"
        )
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ValueError(f"{name} is not causal: its tokens see what follows them, which cannot be trained")
    asked = [option for option in _NOT_COMPUTED if options.get(option) is not None]
    if asked:
        raise ValueError(f"{name} passes {asked[0]} ({_NOT_COMPUTED[asked[0]]}), which is not computed here")


def _window(name: str, mask: Tensor | CausalMask | None, passed: int | None, max_seqlen: int) -> int | None:
    """Return the window of a layer, if it is shorter than a document.

    Some layers are told their window; with others only the mask knows it. Where both speak they must agree.
    """

    def effective(window: int | None) -> int | None:
        return window if window and window < max_seqlen else None

    if not isinstance(mask, CausalMask):
        return effective(passed)
    window = effective(mask.window)
    if passed is not None and effective(passed) != window:
        raise ValueError(
            f"{name} has a sliding window of {passed} tokens, and its mask one of {mask.window}, so that one "
            "of them is not meant; this architecture is not supported"
        )
    return window


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: VarlenMetadata, scoring: AttentionOptions) -> Tensor:
    # One split, whose backward pass is one concatenation: that of a slice would fill a whole row each time.
    sizes = [group.count * group.length for group in documents.groups]
    pieces = zip(
        *(tensor.index_select(0, documents.gather).split_with_sizes(sizes) for tensor in (q, k, v)),
        strict=True,
    )
    outputs = []
    for group, piece in zip(documents.groups, pieces, strict=True):
        queries, keys, values = (
            tensor.view(group.count, group.length, *tensor.shape[1:]).transpose(1, 2) for tensor in piece
        )
        outputs.append(attend(queries, keys, values, scoring).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, documents.scatter)


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: VarlenMetadata, scoring: AttentionOptions) -> Tensor:
    cu_seqlens, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    # Flash counts the tokens before the one that looks, we and transformers that one as well.
    window = (-1 if scoring.window is None else scoring.window - 1, 0)
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        attended: Tensor = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=scoring.dropout,
            softmax_scale=scoring.scaling, causal=True, window_size=window, softcap=scoring.softcap or 0.0,
        )  # fmt: skip
        return attended
    from torch.nn.attention.varlen import varlen_attn

    for what, value in (("dropout", scoring.dropout), ("softcap", scoring.softcap)):
        if value:
            raise ValueError(
                f"attention {what} {value} requires the package flash-attn; install the extra "
                "`cuda`, or use model.attention: sdpa, which is slower"
            )
    grouped = q.shape[1] != k.shape[1]
    result = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scoring.scaling, window_size=window, enable_gqa=grouped,
    )  # fmt: skip
    return result if isinstance(result, Tensor) else result[0]


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def select_attn_backend(
    wanted: Literal["auto", "flash", "sdpa"], device: torch.device, dtype: torch.dtype, config: Any = None
) -> AttnBackend:
    """Return the attention backend: flash for bf16 and fp16 on CUDA devices of capability 8.0 or higher.

    Args:
        wanted: What the job says.
        device: Where it runs.
        dtype: Number format of the model.
        config: The model's; some of what it may ask for, only the package flash-attn computes on flash.

    Raises:
        SpecError: Flash is wanted for what the package would have to compute, and it is not installed.
    """
    asked = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "attention_dropout")}
    beyond_torch = [] if _has_flash_attn() else [f"{name}={value}" for name, value in asked.items() if value]
    if wanted == "flash" and beyond_torch:
        raise SpecError(
            f"model.attention=flash cannot compute {beyond_torch[0]} without the package flash-attn; install "
            "the extra `cuda`, or use attention: auto"
        )
    if wanted != "auto":
        return wanted
    able = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not beyond_torch
    return "flash" if able and torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def register() -> None:
    """Make `documents` known to transformers, as attention and as a mask that is never built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, document_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args: Any, **kwargs: Any) -> CausalMask:
    """Say which mask of T x T transformers would build here.

    Raises:
        ValueError: It would not be causal, or a model changes it.
    """
    # Only masks that look both ways are offered to be left out on that account; only masks that a model
    # changes itself need vmap.
    if "allow_is_bidirectional_skip" in kwargs or kwargs.get("use_vmap"):
        name = type(kwargs.get("config")).__name__
        raise ValueError(f"the attention mask of {name} is not plainly causal; it is not supported")
    return CausalMask(kwargs.get("local_size"))
