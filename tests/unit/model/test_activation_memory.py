"""Checkpointing, offload and tiling change what is saved and recomputed, but not the gradients."""

import copy
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.errors import SpecError
from orchestrator.model import activation_memory, attention
from orchestrator.model.activation_memory import checkpoint_layers, tile_mlps, tiled_mlps
from orchestrator.model.attention import VarlenMetadata

LENGTHS = (9, 4, 11)  # documents in one pack of 24 tokens
LAYERS = 3
HIDDEN = 32
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
ACTIVATION = "aten::silu"


def build(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION).train()


@pytest.fixture(scope="module")
def plain() -> Any:
    return build()


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(sum(LENGTHS))[None] % 64
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    documents = VarlenMetadata.from_lengths(LENGTHS, "sdpa", torch.device("cpu"))
    output = model(input_ids=ids, position_ids=positions, documents=documents, use_cache=False)
    return output.logits.square().mean()  # type: ignore[no-any-return]


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


class Operators(TorchDispatchMode):
    """Counts calls of every operator by its name without overload, such as `aten::mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def run_backward(model: Any) -> Counter[str]:
    """Return the operator counts of a backward pass, including recomputation."""
    loss = loss_of(model)
    with Operators() as operators:
        loss.backward()
    return operators.seen


@pytest.mark.parametrize(
    ("keep", "again"),
    [
        ("none", {ATTENTION: 0, ACTIVATION: 0}),
        ("selective", {ATTENTION: 0, ACTIVATION: LAYERS}),
        # Two attention calls per layer: sdpa groups documents by rounded length, 8 (4) and 16 (9 and 11).
        ("full", {ATTENTION: 2 * LAYERS, ACTIVATION: LAYERS}),
    ],
)
def test_what_runs_again_in_the_backward_pass(
    keep: Literal["full", "selective", "none"], again: dict[str, int], plain: Any
) -> None:
    model = copy.deepcopy(plain)
    products = run_backward(model)["aten::mm"]
    checkpoint_layers(model, keep, offload=False)
    seen = run_backward(model)
    assert {name: seen[name] for name in again} == again
    assert (seen["aten::mm"] > products) == (keep == "full")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("keep", ["none", "selective", "full"])
@pytest.mark.parametrize("tile_tokens", [None, 7, 1000])
def test_gradients_stay_the_same(
    keep: Literal["full", "selective", "none"], offload: bool, tile_tokens: int | None, plain: Any
) -> None:
    model = copy.deepcopy(plain)
    checkpoint_layers(model, keep, offload)
    if tile_tokens:
        tile_mlps(model, tile_tokens)
    found, expected = gradients(model), gradients(plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_selective_computes_less_again_than_full(plain: Any) -> None:
    work = {}
    for keep in ("none", "selective", "full"):
        model = copy.deepcopy(plain)
        checkpoint_layers(model, keep, offload=False)  # type: ignore[arg-type]
        work[keep] = run_backward(model).total()
    assert work["none"] < work["selective"] < work["full"]


def test_offloading_moves_each_layers_input_and_nothing_else(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, ...]] = []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory, "there is nothing to pin for without CUDA"

            def pack(tensor: Tensor) -> Tensor:
                moved.append(tuple(tensor.shape))
                return tensor.clone()

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(activation_memory, "save_on_cpu", Spy)
    model = copy.deepcopy(plain)
    checkpoint_layers(model, "full", offload=True)
    gradients(model)
    assert moved == [(1, sum(LENGTHS), HIDDEN)] * LAYERS


def test_no_product_of_an_mlp_sees_more_than_a_tile(plain: Any) -> None:
    model = copy.deepcopy(plain)
    checkpoint_layers(model, "full", offload=False)
    tile_mlps(model, 7)
    assert tiled_mlps(model) == [layer.mlp for layer in model.model.layers]
    tokens: list[int] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
    gradients(model)
    assert max(tokens) == 7
    # 24 tokens in tiles of 7, 7, 7 and 3. Forward: 24. Recomputation of the layer stops before its last tile:
    # 21. Recomputation of each tile: 24.
    assert sum(tokens) == LAYERS * (24 + 21 + 24)


def test_names_of_parameters_stay(plain: Any) -> None:
    model = copy.deepcopy(plain)
    tile_mlps(model, 7)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_mixture_of_experts_is_refused() -> None:
    model = build("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    with pytest.raises(SpecError, match=r"mlp_tile_tokens=7 cannot be used with Qwen3MoeForCausalLM"):
        tile_mlps(model, 7)


def test_a_model_that_cannot_recompute_is_refused() -> None:
    class Fixed(nn.Module):
        supports_gradient_checkpointing = False

    with pytest.raises(SpecError, match="gradient_checkpointing=selective cannot be used with Fixed"):
        checkpoint_layers(Fixed(), "selective", offload=False)
