"""Attention over packed documents equals attention over each document alone, forward and backward."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.attention import VarlenMetadata, document_attention

CPU = torch.device("cpu")
HEAD_DIM = 6

LENGTHS = {
    "one document": [37],
    "odd lengths": [5, 17, 33, 1, 9, 63, 2],
    "equal lengths": [12, 12, 12],
    "many of length 1": [1] * 40,
    "longer than a grain": [130, 7, 129, 300],
    "only one token": [1],
}


def tensors(lengths: Sequence[int], heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q of shape [1, heads, T, HEAD_DIM], k and v of shape [1, kv_heads, T, HEAD_DIM]."""
    generator = torch.Generator().manual_seed(3)
    shape = (sum(lengths), HEAD_DIM)
    return [
        torch.randn(1, count, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
    """Compute reference attention document by document; returns shape [1, T, heads, HEAD_DIM]."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for query, key, value in zip(
        *(tensor[0].split(list(lengths), dim=1) for tensor in (q, k, v)), strict=True
    ):
        keys, values = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        scores = query @ keys.transpose(1, 2) * scaling
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ values)
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], **options: Any) -> Tensor:
    documents = VarlenMetadata.from_lengths(lengths, "sdpa", CPU)
    output, weights = document_attention(nn.Identity(), q, k, v, None, documents=documents, **options)
    assert weights is None
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_documents_are_attended_as_if_alone(
    lengths: list[int], groups: int, dtype: torch.dtype
) -> None:
    parts = tensors(lengths, heads=4, kv_heads=4 // groups, dtype=dtype)
    scaling = 0.3
    ours, expected = packed(*parts, lengths, scaling=scaling), alone(*parts, lengths, scaling)
    assert ours.shape == (1, sum(lengths), 4, HEAD_DIM)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 if dtype is torch.float32 else 1e-12}
    torch.testing.assert_close(ours, expected, **tolerance)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(
        dtype
    )
    gradients = torch.autograd.grad((ours * weight).sum(), parts)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), parts), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


def test_the_usual_scale_is_the_root_of_the_head_dimension() -> None:
    lengths = [9, 4]
    parts = tensors(lengths, 2, 2, torch.float64)
    torch.testing.assert_close(packed(*parts, lengths), alone(*parts, lengths, HEAD_DIM**-0.5))


@pytest.mark.parametrize("lengths", [[11, 5, 26], [8, 8, 8], [1, 40, 1]])
def test_a_document_does_not_see_the_others(lengths: list[int]) -> None:
    parts = tensors(lengths, 4, 2, torch.float32)
    before = packed(*parts, lengths).detach()
    start, stop = lengths[0], lengths[0] + lengths[1]
    with torch.no_grad():
        for tensor in parts:
            tensor[:, :, start:stop] += 7.0
    after = packed(*parts, lengths).detach()
    outside = [*range(start), *range(stop, sum(lengths))]
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.equal(before[:, start:stop], after[:, start:stop])


def test_a_token_does_not_see_what_follows_it() -> None:
    lengths = [21, 13]
    parts = tensors(lengths, 4, 2, torch.float32)
    before = packed(*parts, lengths).detach()
    with torch.no_grad():
        for tensor in parts:
            tensor[:, :, 20] += 7.0  # the last token of the first document
    assert torch.equal(before[:, :20], packed(*parts, lengths)[:, :20])


def test_no_gradient_reaches_another_document() -> None:
    lengths = [11, 5, 26]
    parts = tensors(lengths, 4, 2, torch.float32)
    gradients = torch.autograd.grad(packed(*parts, lengths)[:, 11:16].sum(), parts)
    for gradient in gradients:
        assert gradient[:, :, 11:16].abs().sum() > 0
        assert gradient[:, :, :11].abs().sum() == gradient[:, :, 16:].abs().sum() == 0


def test_like_lengths_share_a_call_and_padding_stays_under_an_eighth_or_a_grain() -> None:
    documents = VarlenMetadata.from_lengths([100, 97, 3, 100, 2], "sdpa", CPU)
    assert sorted((group.count, group.length) for group in documents.groups) == [(2, 8), (3, 104)]
    for length in range(1, 5000):
        rounded = attention._round_up(length)
        assert length <= rounded <= max(-(-length // 8) * 8, length * 9 / 8)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_position_is_gathered_and_scattered_to_itself(lengths: list[int]) -> None:
    documents = VarlenMetadata.from_lengths(lengths, "sdpa", CPU)
    assert torch.equal(documents.gather[documents.scatter], torch.arange(sum(lengths)))
    assert documents.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert documents.max_seqlen == max(lengths)


# Unsupported inputs


def refused(**options: Any) -> str:
    parts = tensors([6, 3], 2, 2, torch.float32)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the caller looks at the text
        document_attention(nn.Linear(1, 1), *parts, **{"attention_mask": None, **options})
    return str(caught.value)


def test_without_boundaries_nothing_is_computed() -> None:
    assert "Linear does not pass document boundaries" in refused(documents=None)
    documents = VarlenMetadata.from_lengths([6, 3], "sdpa", CPU)
    assert "does not pass document boundaries" in refused(
        documents=documents, attention_mask=torch.ones(9, 9)
    )


def test_more_than_one_row_is_refused() -> None:
    rows = [tensor.expand(2, -1, -1, -1) for tensor in tensors([6, 3], 2, 2, torch.float32)]
    with pytest.raises(ValueError, match="does not pass document boundaries"):
        document_attention(
            nn.Identity(), *rows, None, documents=VarlenMetadata.from_lengths([6, 3], "sdpa", CPU)
        )


def test_chunks_that_cut_a_document_are_refused_and_others_have_no_effect() -> None:
    documents = VarlenMetadata.from_lengths([6, 3], "sdpa", CPU)
    layer = nn.Linear(1, 1)
    layer.config = SimpleNamespace(attention_chunk_size=5)  # type: ignore[assignment]
    parts = tensors([6, 3], 2, 2, torch.float32)
    with pytest.raises(ValueError, match="chunks of 5 tokens, but a document has 6; set"):
        document_attention(layer, *parts, None, documents=documents)
    layer.config.attention_chunk_size = 6  # type: ignore[assignment]
    output, _ = document_attention(layer, *parts, None, documents=documents)
    assert torch.equal(output, packed(*parts, [6, 3]))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"s_aux": torch.zeros(2)}, "passes s_aux (attention sinks)"),
        ({"position_bias": torch.zeros(2)}, "passes position_bias"),
        ({"is_causal": False}, "is not causal"),
    ],
)
def test_variants_that_are_not_computed_are_refused(option: dict[str, Any], reason: str) -> None:
    assert reason in refused(documents=VarlenMetadata.from_lengths([6, 3], "sdpa", CPU), **option)


def test_a_layer_that_is_not_causal_is_refused() -> None:
    layer = nn.Linear(1, 1)
    layer.is_causal = False  # type: ignore[assignment]
    parts = tensors([6, 3], 2, 2, torch.float32)
    with pytest.raises(ValueError, match="Linear is not causal"):
        document_attention(layer, *parts, None, documents=VarlenMetadata.from_lengths([6, 3], "sdpa", CPU))


def test_a_window_that_only_the_mask_knows_is_taken() -> None:
    parts, lengths = tensors([20, 9], 4, 2, torch.float32), [20, 9]
    documents = VarlenMetadata.from_lengths(lengths, "sdpa", CPU)
    output, _ = document_attention(nn.Identity(), *parts, attention.CausalMask(5), documents=documents)
    assert torch.equal(output, packed(*parts, lengths, sliding_window=5))


def test_a_layer_and_a_mask_that_do_not_agree_on_the_window_are_refused() -> None:
    documents = VarlenMetadata.from_lengths([6, 3], "sdpa", CPU)
    sentence = refused(documents=documents, attention_mask=attention.CausalMask(None), sliding_window=5)
    assert "sliding_window=5, but its attention mask has a window of None" in sentence
    parts = tensors([6, 3], 2, 2, torch.float32)
    document_attention(
        nn.Identity(), *parts, attention.CausalMask(None), documents=documents, sliding_window=6
    )  # a window of 6 does not affect documents of at most 6 tokens, so mask and layer agree


def test_a_model_that_works_on_its_mask_is_told_why_it_cannot() -> None:
    with pytest.raises(AttributeError, match="reads `shape` of its attention mask"):
        attention.CausalMask(None).shape  # noqa: B018


@pytest.mark.parametrize("mask", [{"use_vmap": True}, {"allow_is_bidirectional_skip": True}])
def test_a_mask_that_is_not_plainly_causal_is_refused(mask: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="the attention mask of int is not plainly causal"):
        attention._mask(config=3, **mask)


# Attention in a complete model


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION).eval()


def logits(model: Any, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = VarlenMetadata.from_lengths(lengths, "sdpa", CPU)
    with torch.no_grad():
        return model(  # type: ignore[no-any-return]
            input_ids=ids[None], position_ids=positions[None], documents=documents, use_cache=False
        ).logits[0]


def test_a_model_gives_packed_documents_the_logits_that_it_gives_each_alone(model: Any) -> None:
    lengths = [13, 1, 30, 5]
    ids = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    together = logits(model, ids, lengths)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = [model(input_ids=part[None]).logits[0] for part in ids.split(lengths)]
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_token_of_one_document_changes_no_logit_of_another(model: Any) -> None:
    lengths = [13, 8, 30]
    ids = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[15] = (other[15] + 1) % 64
    before, after = logits(model, ids, lengths), logits(model, other, lengths)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(15, 21))


def test_a_model_that_is_called_without_boundaries_fails(model: Any) -> None:
    with pytest.raises(ValueError, match="LlamaAttention does not pass document boundaries"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_which_kernel_is_used() -> None:
    assert attention.select_attn_backend("auto", CPU, torch.bfloat16) == "sdpa"
    assert attention.select_attn_backend("sdpa", torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert attention.select_attn_backend("flash", CPU, torch.float32) == "flash"
    assert attention.select_attn_backend("auto", torch.device("cuda"), torch.float32) == "sdpa"


@pytest.mark.parametrize("asks", [{"attn_logit_softcapping": 50.0}, {"attention_dropout": 0.1}])
def test_what_torch_s_flash_does_not_compute_goes_to_another_kernel(
    asks: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu, plain = torch.device("cuda"), {"attn_logit_softcapping": None, "attention_dropout": 0.0}
    config = SimpleNamespace(**{**plain, **asks})
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    assert attention.select_attn_backend("auto", gpu, torch.bfloat16, SimpleNamespace(**plain)) == "flash"
    assert attention.select_attn_backend("auto", gpu, torch.bfloat16, config) == "sdpa"
    with pytest.raises(SpecError, match="without the package flash-attn; install the extra `cuda`"):
        attention.select_attn_backend("flash", gpu, torch.bfloat16, config)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    assert attention.select_attn_backend("auto", gpu, torch.bfloat16, config) == "flash"
    assert attention.select_attn_backend("flash", gpu, torch.bfloat16, config) == "flash"
