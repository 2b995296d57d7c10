"""The loss is the plain sum over labelled positions, and a batch without labels still takes part."""

from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.loader import MicroBatch
from orchestrator.model import attention
from orchestrator.model.loss import Inputs, loss_sum

LENGTHS = (9, 4, 11)


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
    """Return a batch whose tokens at `trained` are the targets."""
    ids = np.random.default_rng(1).integers(1, 64, sum(LENGTHS))
    targets = np.array(trained, dtype=np.int64)
    return MicroBatch(
        input_ids=ids,
        position_ids=np.concatenate([np.arange(length) for length in LENGTHS]),
        document_lengths=LENGTHS,
        label_positions=targets - 1,
        labels=ids[targets],
        tokens=sum(LENGTHS),
        square_tokens=sum(length * length for length in LENGTHS),
    )


def inputs(trained: list[int]) -> Inputs:
    return Inputs.of(batch(trained), "sdpa", torch.device("cpu"))


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
    assert seen == [(1, 3, 64)]


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
