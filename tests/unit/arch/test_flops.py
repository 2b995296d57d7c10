"""FLOP formulas agree with torch's FlopCounterMode on packed documents.

torch counts full attention, L^2, and the formulas count the causal half, so torch must count twice the
formula. All document lengths are ones that the sdpa backend does not pad, because padding would be
counted. FlopCounterMode does not support the fused CPU attention operator, so attention runs with the math
kernel, whose batched matmuls are counted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.arch.flops import (
    ForwardFlops,
    FrozenWeights,
    Recomputation,
    flops_per_token_xtuner,
    forward_flops,
    hardware_flops,
    model_flops,
    squares_in_window,
)
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.schema import MethodSpec
from orchestrator.data.loader import MicroBatch
from orchestrator.model import attention
from orchestrator.model.activation_memory import checkpoint_layers, tile_mlps
from orchestrator.model.adapters import adapt, adapts_last_matmul, num_adapter_params
from orchestrator.model.loss import ModelInputs, loss_sum

SHAPE = ModelDims(
    hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=24, intermediate_size=96, vocab_size=160
)
LENGTHS = (64, 16, 48, 8, 120)
SCORED = 90
FORWARD = forward_flops(SHAPE, sum(LENGTHS), sum(length * length for length in LENGTHS), SCORED)


@pytest.fixture
def model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        intermediate_size=SHAPE.intermediate_size,
        vocab_size=SHAPE.vocab_size,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION)


def inputs() -> ModelInputs:
    ids = np.random.default_rng(0).integers(1, SHAPE.vocab_size, sum(LENGTHS))
    positions = np.arange(10, 10 + SCORED)
    batch = MicroBatch(
        input_ids=ids,
        position_ids=np.concatenate([np.arange(length) for length in LENGTHS]),
        document_lengths=LENGTHS,
        label_positions=positions,
        labels=ids[positions + 1],
        tokens=sum(LENGTHS),
        square_tokens=sum(length * length for length in LENGTHS),
    )
    return ModelInputs.from_batch(batch, "sdpa", torch.device("cpu"))


def counted(work: Callable[[], object]) -> ForwardFlops:
    """Return torch's FLOP counts by part: `mm` counts as linear (or head), `bmm` as attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    by_module = {
        name: {str(op): n for op, n in ops.items()} for name, ops in counter.get_flop_counts().items()
    }
    whole = by_module["Global"]
    assert set(whole) <= {"aten.mm", "aten.bmm"}
    head = by_module["LlamaForCausalLM.lm_head"]["aten.mm"]
    return ForwardFlops(linear=whole["aten.mm"] - head, attention=whole["aten.bmm"], head=head)


def test_no_document_is_padded_here() -> None:
    assert all(attention._round_up(length) == length for length in LENGTHS)


def test_a_forward_pass(model: Any) -> None:
    found = counted(lambda: loss_sum(model, inputs()))
    assert FORWARD.linear == pytest.approx(found.linear, rel=0.01)
    assert FORWARD.head == pytest.approx(found.head, rel=0.01)
    assert 2 * FORWARD.attention == pytest.approx(found.attention, rel=0.01)


def test_a_training_step_is_three_forward_passes(model: Any) -> None:
    found = counted(lambda: loss_sum(model, inputs()).backward())
    assert model_flops(FORWARD) == pytest.approx(3 * FORWARD.total)
    assert 3 * FORWARD.linear == pytest.approx(found.linear, rel=0.01)
    assert 3 * FORWARD.head == pytest.approx(found.head, rel=0.01)
    assert 2 * 3 * FORWARD.attention == pytest.approx(found.attention, rel=0.01)
    total = found.linear + found.head + found.attention / 2
    assert model_flops(FORWARD) == pytest.approx(total, rel=0.01)
    assert hardware_flops(FORWARD, Recomputation(zero_stage=2)) == pytest.approx(total, rel=0.01)


def checkpointed(model: Any, early_stop: bool, keep: Literal["full", "selective"] = "full") -> ForwardFlops:
    checkpoint_layers(model, keep, offload=False)
    model.train()

    def step() -> None:
        with set_checkpoint_early_stop(early_stop):
            loss_sum(model, inputs()).backward()

    return counted(step)


def test_gradient_checkpointing_runs_the_layers_once_more_and_not_the_head(model: Any) -> None:
    found = checkpointed(model, early_stop=False)
    assert 4 * FORWARD.linear == pytest.approx(found.linear, rel=0.01)
    assert 3 * FORWARD.head == pytest.approx(found.head, rel=0.01)
    assert 2 * 4 * FORWARD.attention == pytest.approx(found.attention, rel=0.01)
    total = found.linear + found.head + found.attention / 2
    assert hardware_flops(FORWARD, Recomputation("full", 3)) == pytest.approx(total, rel=0.01)


def test_without_zero_3_recomputation_stops_before_the_last_product(model: Any) -> None:
    found = checkpointed(model, early_stop=True)
    total = found.linear + found.head + found.attention / 2
    assert hardware_flops(FORWARD, Recomputation("full", 2)) == pytest.approx(total, rel=0.01)
    assert 4 * FORWARD.linear - found.linear == pytest.approx(FORWARD.last_matmul, rel=0.01)


def test_selective_checkpointing_runs_no_product_again(model: Any) -> None:
    found = checkpointed(model, early_stop=True, keep="selective")
    total = found.linear + found.head + found.attention / 2
    assert hardware_flops(FORWARD, Recomputation("selective", 2)) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("keep", ["full", "none"])
def test_a_tiled_mlp_runs_again_and_a_checkpointed_layer_stops_before_its_last_tile(
    keep: Literal["full", "none"], model: Any
) -> None:
    tile_mlps(model, 64)
    checkpoint_layers(model, keep, offload=False)
    model.train()
    found = counted(lambda: loss_sum(model, inputs()).backward())
    total = found.linear + found.head + found.attention / 2
    # 256 tokens are four tiles of 64, so every tile has the same FLOPs.
    assert hardware_flops(FORWARD, Recomputation(keep, 2, mlp_tiles=4)) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("targets", ["all-linear", "attention", ("q_proj", "up_proj")])
@pytest.mark.parametrize("keep", ["selective", "full"])
def test_frozen_weights_need_no_gradient_and_adapters_do(
    keep: Literal["selective", "full"], targets: Any, model: Any
) -> None:
    checkpoint_layers(model, keep, offload=False)
    adapted = adapt(
        model, MethodSpec(type="lora", rank=4, target_modules=targets), torch.float32, seed=0
    ).train()
    parameters = num_adapter_params(adapted)
    squares = sum(length * length for length in LENGTHS)
    forward = forward_flops(SHAPE, sum(LENGTHS), squares, SCORED, num_adapter_params=parameters)
    again = Recomputation(keep, 2, adapts_last_matmul=adapts_last_matmul(adapted))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_sum(adapted, inputs()).backward()
    whole = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    found = whole["aten.mm"] + whole["aten.bmm"] / 2
    assert hardware_flops(forward, again, FrozenWeights(layers=True, head=True)) == pytest.approx(
        found, rel=0.01
    )
    assert adapts_last_matmul(adapted) == (targets == "all-linear")


def test_parts_by_hand() -> None:
    shape = ModelDims(2, 1, 1, 1, 2, 3, 5)  # 4 x (2 x 2) + 3 x (2 x 3) = 34 linear weights per layer
    forward = forward_flops(shape, tokens=7, square_tokens=25, scored_tokens=4)
    assert forward == ForwardFlops(
        linear=2 * 34 * 7, attention=2 * 2 * 25, head=2 * 2 * 5 * 4, last_matmul=2 * 6 * 7
    )
    assert forward.total == 476 + 100 + 80
    assert model_flops(forward) == 3 * 656
    assert hardware_flops(forward, Recomputation("full", 3)) == 3 * 656 + 576
    assert hardware_flops(forward, Recomputation("selective", 3)) == 3 * 656
    assert hardware_flops(forward, Recomputation("none", 3, tiled_head=True)) == 3 * 656 + forward.head
    assert hardware_flops(forward, Recomputation("full", 2)) == 3 * 656 + 576 - 2 * 6 * 7
    assert hardware_flops(forward, Recomputation("none", 3, mlp_tiles=4)) == 3 * 656 + 252
    assert hardware_flops(forward, Recomputation("full", 3, mlp_tiles=4)) == 3 * 656 + 576 + 252 - 63


def test_packing_pays_for_documents_and_not_for_the_pack() -> None:
    whole = forward_flops(SHAPE, 1024, 1024**2, 0)
    halves = forward_flops(SHAPE, 1024, 2 * 512**2, 0)
    assert halves.attention == whole.attention / 2
    assert halves.linear == whole.linear


@pytest.mark.parametrize("window", [1, 7, 48, 64, 119, 120])
def test_a_window_counts_the_pairs_that_it_lets_see_each_other(window: int) -> None:
    behind = np.arange(120)[:, None] - np.arange(120)
    for length in LENGTHS:
        within = behind[:length, :length]
        pairs = np.count_nonzero((within >= 0) & (within < window))
        # For L >= w there are w L - w (w - 1) / 2 visible pairs; twice that exceeds 2 w L - w^2 by w.
        assert squares_in_window([length], window) == 2 * pairs - min(length, window)
    assert squares_in_window(LENGTHS, window) == sum(
        squares_in_window([length], window) for length in LENGTHS
    )


def test_only_layers_with_a_window_are_counted_by_it() -> None:
    shape = replace(SHAPE, sliding_window_layers=2, window=16)
    squares, windowed = sum(length**2 for length in LENGTHS), squares_in_window(LENGTHS, 16)
    assert windowed < squares / 2
    found = forward_flops(shape, sum(LENGTHS), squares, SCORED, windowed)
    assert found.attention == FORWARD.attention * (squares + 2 * windowed) / (3 * squares)
    assert (found.linear, found.head) == (FORWARD.linear, FORWARD.head)
    assert forward_flops(shape, sum(LENGTHS), squares, SCORED) == FORWARD
    assert forward_flops(SHAPE, sum(LENGTHS), squares, SCORED, 0.0) == FORWARD


def test_xtuners_formula_by_hand() -> None:
    shape = ModelDims(
        hidden_size=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate_size=16, vocab_size=100
    )
    # r = 1.5 x 16 / 8 = 3; FLOPs per layer: 8 x 64 + 4 x 10 x 8 / 2 + 4 x 3 x 64 = 512 + 160 + 768 = 1440
    assert flops_per_token_xtuner(shape, 10) == 4 * 2 * 1440 + 6 * 8 * 100
    assert flops_per_token_xtuner(shape, 10, checkpointing=False) == 3 * 2 * 1440 + 6 * 8 * 100
    assert flops_per_token_xtuner(shape, 10, causal=False) == 4 * 2 * 1600 + 6 * 8 * 100


def test_an_mlp_without_a_gate_is_two_products() -> None:
    shape = ModelDims(
        2, 1, 1, 1, 2, 3, 5, mlp_matrices=2
    )  # 4 x (2 x 2) + 2 x (2 x 3) = 28 linear weights per layer
    forward = forward_flops(shape, tokens=1, square_tokens=0.0, scored_tokens=0)
    assert forward.linear == 2 * 28
    assert forward.mlp == 2 * 2 * (2 * 3)
