"""An export loads wherever its base model did, and computes what the run's weights compute."""

from __future__ import annotations

import pytest
import torch

from tests.exports import compute
from tests.exports.conftest import CASES, Exported


@pytest.mark.parametrize("name", CASES)
def test_an_export_computes_what_the_checkpoint_does(name: str, exported: dict[str, Exported]) -> None:
    found = exported[name]
    answer = compute.answer(**found.task)
    torch.testing.assert_close(torch.tensor(answer["logits"]), found.logits, rtol=1e-5, atol=1e-5)
    expected = compute.answer(str(found.base), trust=found.task["trust"])
    assert (torch.tensor(expected["logits"]) - found.logits).abs().max() > 0.1
    assert {key: answer[key] for key in ("tokens", "special", "chat")} == {
        key: expected[key] for key in ("tokens", "special", "chat")
    }
    assert answer["eos"] == expected["eos"] == [2, 3]
