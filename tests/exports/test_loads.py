"""Each export loads in transformers and computes the logits of its checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.exports import compute
from tests.exports.conftest import CASES, Exported


@pytest.mark.parametrize("name", CASES)
def test_an_export_computes_the_logits_of_its_checkpoint(name: str, exported: dict[str, Exported]) -> None:
    case = exported[name]
    answer = compute.answer(**case.task)
    torch.testing.assert_close(torch.tensor(answer["logits"]), case.logits, rtol=1e-5, atol=1e-5)
    expected = compute.answer(str(case.base), trust=case.task["trust"])
    assert (torch.tensor(expected["logits"]) - case.logits).abs().max() > 0.1
    assert {key: answer[key] for key in ("tokens", "special", "chat")} == {
        key: expected[key] for key in ("tokens", "special", "chat")
    }
    assert answer["eos"] == expected["eos"] == [2, 3]
