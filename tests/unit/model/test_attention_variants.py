"""Sliding windows and softcapping equal a reference formula, forward and backward, on every backend."""

import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.model import attention, sdpa
from orchestrator.model.attention import VarlenMetadata, document_attention

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
SCALING = 0.7
LENGTHS = [5, 17, 33, 1, 9, 63, 2, 62]


@pytest.fixture(params=[(512, 64), (8, 3)], ids=["whole", "blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with all queries in one block, and with blocks of few queries."""
    monkeypatch.setattr(sdpa, "_QUERIES_AT_ONCE", request.param[0])
    monkeypatch.setattr(sdpa, "_LEAST_BLOCK", request.param[1])


def tensors(lengths: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, heads, sum(lengths), HEAD_DIM, generator=generator, dtype=dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def packed(parts: list[Tensor], lengths: Sequence[int], **options: Any) -> Tensor:
    documents = VarlenMetadata.from_lengths(lengths, options.pop("attn_backend", "sdpa"), CPU)
    return document_attention(nn.Identity(), *parts, None, SCALING, documents=documents, **options)[0]


def formula(
    parts: list[Tensor],
    lengths: Sequence[int],
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute reference attention: query i sees the keys i - window < j <= i of its document.

    Args:
        parts: q [1, HEADS, T, HEAD_DIM], and k and v [1, KV_HEADS, T, HEAD_DIM].
        lengths: Tokens of each document; their sum is T.
        sliding_window: The window, or None.
        softcap: The softcap, or None.

    Returns:
        Tensor of shape [1, T, HEADS, HEAD_DIM].
    """
    tokens = sum(lengths)
    # Boolean mask [T, T] of causal attention within documents and the window.
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (document[:, None] == document) & (behind >= 0) & (behind < (sliding_window or tokens))
    query, key, value = parts[0][0], *(part[0].repeat_interleave(HEADS // KV_HEADS, 0) for part in parts[1:])
    scores = query @ key.transpose(1, 2) * SCALING
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ value).transpose(0, 1).unsqueeze(0)


def assert_same(ours: Tensor, expected: Tensor, parts: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=ours.dtype)
    found, wanted = (torch.autograd.grad((each * weight).sum(), parts) for each in (ours, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 2, 8, 9, 31, 62, 63, 1000])
def test_packed_documents_are_attended_by_the_formula(window: int | None, softcap: float | None) -> None:
    parts, options = tensors(LENGTHS), {"sliding_window": window, "softcap": softcap}
    assert_same(packed(parts, LENGTHS, **options), formula(parts, LENGTHS, **options), parts)


def test_the_cap_and_the_window_matter_here() -> None:
    parts = tensors(LENGTHS)
    plain = formula(parts, LENGTHS)
    for options in ({"sliding_window": 62}, {"softcap": 0.8}):
        assert not torch.allclose(plain, formula(parts, LENGTHS, **options), rtol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [1, 4, 16, 30])
def test_a_token_is_seen_by_those_within_the_window_and_by_no_other(
    window: int, softcap: float | None
) -> None:
    lengths = [11, 40, 26]
    parts = tensors(lengths, torch.float32)
    before = packed(parts, lengths, sliding_window=window, softcap=softcap).detach()
    for token in (11, 20, 49, 50):
        changed = [part.detach().clone() for part in parts]
        for part in changed[1:]:
            part[:, :, token] += 3.0
        after = packed(changed, lengths, sliding_window=window, softcap=softcap)
        seen = (before != after).flatten(2).any(2)[0].nonzero().flatten().tolist()
        assert seen == list(range(token, min(token + window, 51)))


def test_capped_weights_are_dropped_alike_in_both_passes() -> None:
    lengths = [40, 17]
    parts = tensors(lengths)
    torch.manual_seed(5)
    dropped = packed(parts, lengths, softcap=2.0, dropout=0.5)
    assert not torch.allclose(dropped, formula(parts, lengths, softcap=2.0))
    weight = torch.randn_like(dropped)
    (gradient,) = torch.autograd.grad((dropped * weight).sum(), parts[2])
    # The output is linear in the values, so sum(grad * values) equals the weighted sum of the output if the
    # backward pass uses the same dropout mask as the forward pass.
    assert (gradient * parts[2]).sum().item() == pytest.approx((dropped * weight).sum().item())


def test_capped_scores_are_not_kept_for_the_backward_pass() -> None:
    lengths, kept = [256], 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    parts = tensors(lengths)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(parts, lengths, softcap=2.0, sliding_window=16)
    assert kept <= HEADS * 256 * 64  # elements; a full score matrix would have HEADS * 256 * 256


# Flash backend. The kernels need a GPU, so stand-ins compute attention from the arguments as documented.


def varlen(asked: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Compute attention as flash-attn documents it: keys within [i - left, i + right], both inclusive.

    Args:
        asked: Keyword arguments of the kernel call; a `window_size` of (-1, 0) means no window.
        q: Queries, shape [T, HEADS, HEAD_DIM].
        k: Keys, shape [T, KV_HEADS, HEAD_DIM].
        v: Values, as keys.
        bounds: Cumulative document lengths (cu_seqlens), shape [documents + 1].
    """
    left, right = asked["window_size"]
    assert right == 0
    lengths = bounds.diff().tolist()
    parts = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
    window = None if left == -1 else left + 1
    return formula(parts, lengths, window, asked.get("softcap") or None)[0]


def varlen_of_torch_2_11(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, scale: float, window_size: tuple[int, int]
) -> Tensor:
    assert scale == SCALING
    return varlen({"window_size": window_size}, q, k, v, bounds)


def varlen_of_torch_2_12(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, enable_gqa: bool = False, **asked: Any
) -> Tensor:
    assert enable_gqa == (q.shape[1] != k.shape[1]), "torch raises an error for fewer key heads without it"
    return varlen_of_torch_2_11(q, k, v, bounds, **asked)


@pytest.mark.parametrize("kernel", [varlen_of_torch_2_11, varlen_of_torch_2_12])
@pytest.mark.parametrize("window", [None, 1, 9, 62, 63, 1000])
def test_torch_is_asked_for_the_window(
    window: int | None, kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen as module

    monkeypatch.setattr(module, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    parts = tensors(LENGTHS)
    ours = packed(parts, LENGTHS, attn_backend="flash", sliding_window=window)
    assert_same(ours, formula(parts, LENGTHS, window), parts)
    with pytest.raises(ValueError, match=r"softcap 5\.0 requires the package flash-attn; install"):
        packed(parts, LENGTHS, attn_backend="flash", softcap=5.0)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 9, 62, 63])
def test_flash_attn_is_asked_for_the_window_and_the_cap(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, **asked: Any) -> Tensor:
        assert (asked["softmax_scale"], asked["causal"], asked["dropout_p"]) == (SCALING, True, 0.0)
        return varlen(asked, q, k, v, bounds)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    parts, options = tensors(LENGTHS), {"sliding_window": window, "softcap": softcap}
    ours = packed(parts, LENGTHS, attn_backend="flash", **options)
    assert_same(ours, formula(parts, LENGTHS, **options), parts)  # type: ignore[arg-type]
