"""Causal attention over packed documents: tokens attend within their own document only.

Models are built with the attention implementation `documents`, which this module registers with transformers.
Document boundaries are a keyword argument of the model's forward call and reach each layer from there; no
mask is materialized.

Backends: `flash` runs one variable-length flash attention call per row (CUDA). `sdpa` batches documents of
similar length and runs one causal scaled_dot_product_attention call per batch. Documents are padded on the
right for that; under a causal mask no real token attends to the padding, so the result is exact.

Sliding windows and soft-capped scores are supported; other attention variants raise an error.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from orchestrator.errors import SpecError
from orchestrator.model.sdpa import AttentionOptions, attend
from orchestrator.parallel.ulysses import SequenceGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMPLEMENTATION = "documents"
AttnBackend = Literal["flash", "sdpa"]
_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}


@dataclass(frozen=True)
class LengthGroup:
    """A batch of `count` documents, each padded to `length` tokens, for one SDPA call."""

    count: int
    length: int


@dataclass(frozen=True)
class VarlenMetadata:
    """Boundaries of the documents in a row of T tokens.

    Attributes:
        attn_backend: `flash` or `sdpa`.
        cu_seqlens: Cumulative document lengths, int32, shape [documents + 1], starting at 0 (flash).
        max_seqlen: Tokens in the longest document.
        groups: Batches of documents of similar length (sdpa).
        gather: Row position of every slot of the padded groups, int64, shape [sum of count * length] (sdpa).
        scatter: Index into `gather` of each row position, int64, shape [T] (sdpa).
        sequence: Workers that share the row; None without sequence parallelism.
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
        """Return the metadata of a row.

        Args:
            lengths: Tokens in each document, in row order; their sum is T, so padding counts as documents.
            attn_backend: `flash` or `sdpa`.
            device: Device of the tensors.
            sequence: Workers that share the row; None without sequence parallelism.
        """
        # Computed on the CPU and copied once: on a GPU every length that Python reads would synchronize.
        sizes = torch.tensor(lengths, dtype=torch.int64)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=cu_seqlens[1:])
        groups: tuple[LengthGroup, ...] = ()
        gather = scatter = torch.zeros(0, dtype=torch.int64)
        if attn_backend == "sdpa":
            groups, gather, scatter = _group(sizes, cu_seqlens)
        return cls(
            attn_backend,
            cu_seqlens.to(device, torch.int32),  # flash attention kernels accept int32 only
            max(lengths),
            groups,
            gather.to(device),
            scatter.to(device),
            sequence,
        )


def _group(sizes: Tensor, cu_seqlens: Tensor) -> tuple[tuple[LengthGroup, ...], Tensor, Tensor]:
    """Batch documents by rounded length; return the groups and the gather and scatter indices of the row.

    Args:
        sizes: Document lengths, int64, shape [documents].
        cu_seqlens: Cumulative lengths, int64, shape [documents + 1].
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, size in enumerate(sizes.tolist()):
        by_length[_round_up(size)].append(number)
    groups, pieces = [], []
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    offset = 0  # slots of the groups so far: where the next group starts in `gather`
    for length, members in sorted(by_length.items()):
        chosen = torch.tensor(members)
        slots = torch.arange(length)
        # [count, length]: row position of each slot. Padding slots repeat the document's last position, which
        # keeps the index valid; attention outputs there are discarded by `scatter`.
        positions = torch.minimum(slots, sizes[chosen, None] - 1) + cu_seqlens[chosen, None]
        is_token = slots < sizes[chosen, None]  # [count, length]; False in the padding
        indices = offset + torch.arange(positions.numel()).view_as(positions)  # [count, length], in `gather`
        scatter[positions[is_token]] = indices[is_token]
        groups.append(LengthGroup(len(members), length))
        pieces.append(positions.flatten())
        offset += positions.numel()
    return tuple(groups), torch.cat(pieces), scatter


def _round_up(length: int) -> int:
    """Round a length up by at most 1/8 (or to a multiple of 8), for fewer and larger SDPA calls."""
    multiple = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class CausalMask:
    """Placeholder for the [T, T] mask of transformers, which would need O(T^2) memory.

    Attributes:
        window: Sliding window in tokens, including the query's own; None for full causal attention.
    """

    window: int | None

    def __getattr__(self, name: str) -> NoReturn:
        """Raise an error with the reason, for models that use the mask as a tensor."""
        raise AttributeError(
            f"the model reads `{name}` of its attention mask, but no mask is built for packed documents; "
            "this architecture is not supported"
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
    """Compute causal attention within each document; has the signature of transformers' attention functions.

    Args:
        module: The attention layer.
        query: Shape [1, heads, T, head_dim]; with sequence parallelism T is this worker's part of the row.
        key: Shape [1, kv_heads, T, head_dim]; heads is a multiple of kv_heads.
        value: Shape [1, kv_heads, T, value_dim]; value_dim may differ from head_dim.
        attention_mask: Result of `_mask` or None; document boundaries come from `documents`.
        scaling: Factor of the scores; None means head_dim ** -0.5.
        dropout: Dropout probability of attention weights.
        documents: Document boundaries.
        **kwargs: Further options of the model: `sliding_window` and `softcap`; others raise an error.

    Returns:
        Output of shape [1, T, heads, value_dim], and None in place of the attention weights.

    Raises:
        ValueError: The architecture does not pass the boundaries, or uses an unsupported attention variant.
    """
    name = type(module).__name__
    is_masked = attention_mask is not None and not isinstance(attention_mask, CausalMask)
    if documents is None or is_masked or query.shape[0] != 1:
        raise ValueError(
            f"{name} does not pass document boundaries to its attention, so packed documents would attend to "
            "each other; this architecture is not supported"
        )
    # Per layer and not once per model: windows, chunks and sinks may differ between the layers of a model.
    _refuse_variants(module, documents.max_seqlen, kwargs)
    window = _window(name, attention_mask, kwargs.get("sliding_window"), documents.max_seqlen)
    scoring = AttentionOptions(scaling, dropout, window, kwargs.get("softcap"))
    compute = _flash if documents.attn_backend == "flash" else _sdpa
    sequence = documents.sequence
    # The batch dimension is always 1: a micro-batch is one row, so boundaries alone separate its documents.
    if sequence is None:
        # [1, heads, T, head_dim] -> [T, heads, head_dim], the layout of variable-length attention
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return compute(q, k, v, documents, scoring).unsqueeze(0), None
    # Ulysses: [1, heads, T / sp, head_dim] -> [T, heads / sp, head_dim] and back
    q, k, v = (sequence.to_heads(tensor) for tensor in (query, key, value))
    return sequence.to_sequence(compute(q, k, v, documents, scoring)).unsqueeze(0), None


def _refuse_variants(module: nn.Module, max_seqlen: int, options: Mapping[str, object]) -> None:
    """Raise ValueError for attention variants that are not computed and affect documents of this length."""
    name = type(module).__name__
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)  # Llama 4
    if chunk is not None and chunk < max_seqlen:
        raise ValueError(
            f"{name} attends in chunks of {chunk} tokens, but a document has {max_seqlen}; set "
            f"data.max_length to at most {chunk}"
        )
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ValueError(f"{name} is not causal: tokens attend to later tokens; use a causal model")
    given = [option for option in _UNSUPPORTED if options.get(option) is not None]
    if given:
        raise ValueError(f"{name} passes {given[0]} ({_UNSUPPORTED[given[0]]}), which is not supported")


def _window(name: str, mask: Tensor | CausalMask | None, passed: int | None, max_seqlen: int) -> int | None:
    """Return a layer's sliding window in tokens; None if no document is longer.

    Some architectures pass the window to the attention function, others only build it into the mask; if both
    are given they must agree.
    """

    def effective(window: int | None) -> int | None:
        return window if window and window < max_seqlen else None

    if not isinstance(mask, CausalMask):
        return effective(passed)
    window = effective(mask.window)
    if passed is not None and effective(passed) != window:
        raise ValueError(
            f"{name} passes sliding_window={passed}, but its attention mask has a window of {mask.window}; "
            "this architecture is not supported"
        )
    return window


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: VarlenMetadata, scoring: AttentionOptions) -> Tensor:
    """Run one SDPA call per group; q, k, v and the result have shape [T, heads, head_dim]."""
    # index_select brings documents into group order, padding included. split_with_sizes rather than slices:
    # its backward is one concatenation, while that of each slice allocates zeros for the whole row.
    sizes = [group.count * group.length for group in documents.groups]
    pieces = zip(
        *(tensor.index_select(0, documents.gather).split_with_sizes(sizes) for tensor in (q, k, v)),
        strict=True,
    )
    outputs = []
    for group, piece in zip(documents.groups, pieces, strict=True):
        # [count * length, heads, head_dim] -> [count, heads, length, head_dim]
        queries, keys, values = (
            tensor.view(group.count, group.length, *tensor.shape[1:]).transpose(1, 2) for tensor in piece
        )
        outputs.append(attend(queries, keys, values, scoring).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, documents.scatter)  # drops the padding, restores row order


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: VarlenMetadata, scoring: AttentionOptions) -> Tensor:
    """Run one variable-length flash call; q, k, v and the result have shape [T, heads, head_dim]."""
    cu_seqlens, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    # Flash attention excludes the query's own token from the window size; transformers includes it.
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
    # PyTorch 2.11 has no such argument: its kernel takes fewer key heads than query heads without it.
    is_grouped = q.shape[1] != k.shape[1] and _has_parameter(varlen_attn, "enable_gqa")
    grouped: dict[str, Any] = {"enable_gqa": True} if is_grouped else {}
    result = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scoring.scaling, window_size=window, **grouped,
    )  # fmt: skip
    return result if isinstance(result, Tensor) else result[0]


@lru_cache
def _has_parameter(function: Callable[..., object], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def select_attn_backend(
    requested: Literal["auto", "flash", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
) -> AttnBackend:
    """Return the attention backend: flash for bf16 and fp16 on CUDA devices of capability 8.0 or higher.

    Args:
        requested: `model.attention` of the job.
        device: Device of the model.
        dtype: dtype of the model.
        config: Config of the model; with flash, soft caps and dropout require the package flash-attn.

    Raises:
        SpecError: Flash was requested for a model that requires the package flash-attn, which is missing.
    """
    options = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "attention_dropout")}
    needs_package = [f"{name}={value}" for name, value in options.items() if value and not _has_flash_attn()]
    if requested == "flash" and needs_package:
        raise SpecError(
            f"model.attention=flash cannot compute {needs_package[0]} without the package flash-attn; "
            "install the extra `cuda`, or use attention: auto"
        )
    if requested != "auto":
        return requested
    is_supported = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not needs_package
    return "flash" if is_supported and torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def register() -> None:
    """Register `documents` with transformers as an attention function and a mask function."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, document_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args: object, **kwargs: Any) -> CausalMask:
    """Return a placeholder for the mask that transformers would build.

    Raises:
        ValueError: The mask is not plainly causal.
    """
    # transformers passes allow_is_bidirectional_skip only for bidirectional masks, and use_vmap only for
    # masks with functions added by the model.
    if "allow_is_bidirectional_skip" in kwargs or kwargs.get("use_vmap"):
        name = type(kwargs.get("config")).__name__
        raise ValueError(f"the attention mask of {name} is not plainly causal, which is not supported")
    return CausalMask(kwargs.get("local_size"))
