"""Shows that DeepSpeed's Ulysses wrapper for transformers lets packed documents attend to each other.

This is the reason for this project's own sequence parallelism; a strict xfail reports when it is fixed.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from tests.invariant import reference, upstream
from tests.invariant.conftest import Material
from tests.invariant.group import run_group

pytestmark = pytest.mark.distributed

# The middle of the packed row is inside its third document, so both workers hold tokens of it.
ROWS: dict[str, dict[str, Any]] = {
    "one document": {"lengths": [96]},
    "packed": {"lengths": [17, 9, 33, 37]},
    "packed, with its mask": {"lengths": [17, 9, 33, 37], "mask": True},
}
PACKED = [name for name, row in ROWS.items() if len(row["lengths"]) > 1]
UPSTREAM = (
    f"deepspeed {version('deepspeed')}, runtime/sequence_parallel/ulysses_sp.py: the attention that "
    "UlyssesSPAttentionHF.register_with_transformers installs (uattn_wrapper) sets attention_mask to None, "
    "so with sdpa each token attends to all earlier ones of its row, whatever position_ids say"
)


@pytest.fixture(scope="module")
def losses(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Return the mean loss of each row with two workers, by implementation (`ours`, `upstream`) and row."""
    tasks = [{"name": who, "action": who, "model": str(tiny.model), "rows": ROWS} for who in upstream.ACTIONS]
    folder = tmp_path_factory.mktemp("upstream") / "group"
    try:
        outcomes = run_group(folder, 2, tasks, timeout_seconds=120, module="tests.invariant.upstream")
    except AssertionError as error:
        # A crash must not count as the AssertionError that the xfail below expects.
        raise RuntimeError(str(error)) from None
    found: dict[str, dict[str, float]] = {name: each.answer["losses"] for name, each in outcomes.items()}
    if not all(math.isfinite(loss) for each in found.values() for loss in each.values()):
        raise RuntimeError(f"a loss is not a number: {found}")
    return found


@pytest.fixture(scope="module")
def plain(tiny: Material) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny.model, attn_implementation="eager", dtype=torch.float32)


@torch.no_grad()
def alone(plain: LlamaForCausalLM, name: str) -> float:
    """Return the mean loss of a row's documents, each in a forward pass of its own in one process."""
    lengths = ROWS[name]["lengths"]
    documents = upstream.Drawn.of(lengths)
    total = sum(
        reference.loss_sum(plain, documents.document(number)).item() for number in range(len(lengths))
    )
    return total / upstream.row_of(lengths).trained_tokens


@pytest.mark.parametrize("name", ROWS)
def test_our_loss_is_that_of_single_documents(
    name: str, plain: LlamaForCausalLM, losses: dict[str, dict[str, float]]
) -> None:
    assert losses["ours"][name] == pytest.approx(alone(plain, name), rel=1e-5)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason=UPSTREAM)
def test_upstream_loss_is_that_of_single_documents(
    name: str, plain: LlamaForCausalLM, losses: dict[str, dict[str, float]]
) -> None:
    assert losses["upstream"][name] == pytest.approx(alone(plain, name), rel=1e-5)


def test_upstream_is_right_on_a_row_of_one_document(
    plain: LlamaForCausalLM, losses: dict[str, dict[str, float]]
) -> None:
    assert losses["upstream"]["one document"] == pytest.approx(alone(plain, "one document"), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
def test_what_upstream_computes_is_a_row_whose_documents_see_each_other(
    name: str, plain: LlamaForCausalLM, losses: dict[str, dict[str, float]]
) -> None:
    row = upstream.row_of(ROWS[name]["lengths"])
    logits = plain(
        input_ids=torch.from_numpy(row.input_ids)[None],
        position_ids=torch.from_numpy(row.position_ids)[None],
        attention_mask=_additive(upstream.block_mask([len(row.input_ids)])),
        use_cache=False,
    ).logits[0, torch.from_numpy(row.label_positions)]
    mixed = functional.cross_entropy(logits, torch.from_numpy(row.labels)).item()
    assert losses["upstream"][name] == pytest.approx(mixed, rel=1e-5)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """Convert a boolean mask to the additive mask of eager attention: 0 or -inf."""
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
