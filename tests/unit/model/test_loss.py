"""The loss is the sum over labelled positions, and a batch without labels still has a backward pass."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.schema import MethodSpec
from orchestrator.data.loader import MicroBatch
from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.adapters import adapt
from orchestrator.model.loss import ModelInputs, TiledHead, loss_sum

LENGTHS = (9, 4, 11)
EVERY_OTHER = [3, 5, 7, 10, 12, 15, 17, 19, 21]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION)


def batch(trained: list[int]) -> MicroBatch:
    """Return a micro-batch whose labels are the tokens at the indices `trained`."""
    ids = np.random.default_rng(1).integers(1, 64, sum(LENGTHS))
    targets = np.array(trained, dtype=np.int64)
    # The token at index t is predicted at position t - 1.
    return MicroBatch(
        input_ids=ids,
        position_ids=np.concatenate([np.arange(length) for length in LENGTHS]),
        document_lengths=LENGTHS,
        label_positions=targets - 1,
        labels=ids[targets],
        tokens=sum(LENGTHS),
        square_tokens=sum(length * length for length in LENGTHS),
    )


def inputs(trained: list[int]) -> ModelInputs:
    return ModelInputs.from_batch(batch(trained), "sdpa", torch.device("cpu"))


def test_it_is_the_sum_of_what_each_document_alone_would_lose(model: Any) -> None:
    trained = [3, 4, 8, 10, 12, 20, 23]
    given = batch(trained)
    found = loss_sum(model, inputs(trained))
    expected = torch.zeros(())
    start = 0
    model.set_attn_implementation("eager")
    try:
        for length in LENGTHS:
            ids = torch.from_numpy(given.input_ids[start : start + length])
            chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            inside = [target - start for target in trained if start <= target < start + length]
            expected = expected - sum(chances[target - 1, ids[target]] for target in inside)
            start += length
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_parts_add_up(model: Any) -> None:
    whole = loss_sum(model, inputs([3, 12, 20]))
    parts = [loss_sum(model, inputs([target])) for target in (3, 12, 20)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)


def test_the_head_runs_at_labelled_positions_only(model: Any) -> None:
    seen: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(
        lambda module, given, result: seen.append(tuple(result.shape))
    )
    try:
        loss_sum(model, inputs([3, 12, 20]))
    finally:
        handle.remove()
    assert seen == [(1, 3, 64)]  # [1, trained_tokens, vocab_size]


def test_a_batch_without_labels_gives_nought_and_a_gradient_of_nought(model: Any) -> None:
    loss = loss_sum(model, inputs([]))
    assert loss.item() == 0.0
    model.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_it_is_summed_in_float32(model: Any) -> None:
    low = model.to(torch.bfloat16)
    try:
        assert loss_sum(low, inputs([3, 12])).dtype == torch.float32
    finally:
        model.to(torch.float32)


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
@pytest.mark.parametrize("trained", [[3, 4, 8, 10, 12, 20, 23], [5], []])
def test_a_tiled_head_gives_the_same_loss_and_gradients(model: Any, trained: list[int], tile: int) -> None:
    expected = loss_sum(model, inputs(trained))
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    tiled = copy.deepcopy(model)
    head = TiledHead(tiled, tile)
    found = loss_sum(tiled, inputs(trained), head)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, list(tiled.parameters()), allow_unused=True), gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert list(tiled.state_dict()) == list(model.state_dict())
    ids = torch.ones(1, 4, dtype=torch.int64)
    documents = attention.VarlenMetadata.from_lengths([4], "sdpa", torch.device("cpu"))
    assert tiled(input_ids=ids, documents=documents, use_cache=False).logits.shape == (1, 4, 64)


def test_a_tiled_head_never_holds_more_logits_than_a_tile(model: Any) -> None:
    tiled = copy.deepcopy(model)
    seen: list[int] = []
    plain = tiled.lm_head.forward
    tiled.lm_head.forward = lambda hidden: (seen.append(len(hidden)), plain(hidden))[1]
    head = TiledHead(tiled, 2)
    loss_sum(tiled, inputs([3, 4, 8, 10, 12]), head).backward()
    assert seen == [2, 2, 1, 1, 2, 2], "once forward, and again backward, the last tile first"


def test_a_model_that_changes_its_logits_afterwards_is_refused(model: Any) -> None:
    scaled = copy.deepcopy(model)
    scaled.config.final_logit_softcapping = 30.0
    with pytest.raises(SpecError, match=r"final_logit_softcapping=30\.0.*use loss_tile_tokens: null"):
        TiledHead(scaled, 8)


def test_of_a_trained_head_beside_a_frozen_one_the_trained_one_is_tiled(model: Any) -> None:
    """The number of calls of the module must not depend on the number of tiles: ZeRO-3 gathers per call."""
    method = MethodSpec(type="lora", train_embeddings=True)
    adapted = adapt(copy.deepcopy(model), method, torch.float32, seed=0)
    whole = loss_sum(adapted, inputs(EVERY_OTHER))
    head = adapted.get_output_embeddings()
    calls: list[int] = []
    head.modules_to_save["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    tiled = loss_sum(adapted, inputs(EVERY_OTHER), TiledHead(adapted, 2))
    assert tiled.item() == pytest.approx(whole.item(), rel=1e-6)
    assert len(calls) == 1
    tiled.backward()
    assert head.modules_to_save["default"].weight.grad.abs().sum() > 0
