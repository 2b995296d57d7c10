"""Exports load in transformers 4 and compute the logits of their checkpoints.

    python -m venv old && old/bin/pip install torch transformers==4.56.2 "peft<0.19" accelerate
    ORCHESTRATOR_TRANSFORMERS_4=old/bin/python pytest tests/exports/test_transformers_4.py

docs/exports.md has the results of such a run.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exports import compute
from tests.exports.conftest import CASES, Exported

PYTHON = os.environ.get("ORCHESTRATOR_TRANSFORMERS_4")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        PYTHON is None, reason="ORCHESTRATOR_TRANSFORMERS_4 names no Python with transformers 4"
    ),
]


@pytest.fixture(scope="module")
def answers(exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Load every export in the other environment."""
    root = tmp_path_factory.mktemp("transformers-4")
    (root / "tasks.json").write_text(json.dumps({name: case.task for name, case in exported.items()}))
    command = [str(PYTHON), compute.__file__, str(root / "tasks.json"), str(root / "answers.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    subprocess.run(command, check=True, cwd=Path(root), env=environment, timeout=500)
    loaded: dict[str, Any] = json.loads((root / "answers.json").read_text())
    return loaded


def test_the_other_environment_has_transformers_4(answers: dict[str, Any]) -> None:
    assert answers["transformers"].startswith("4.")


@pytest.mark.parametrize("name", CASES)
def test_transformers_4_computes_the_logits_of_the_checkpoint(
    name: str, exported: dict[str, Exported], answers: dict[str, Any], record_property: Any
) -> None:
    answer, case = answers[name], exported[name]
    assert "error" not in answer, answer
    logits = torch.tensor(answer["logits"])
    record_property("largest difference", (logits - case.logits).abs().max().item())
    torch.testing.assert_close(logits, case.logits, rtol=1e-5, atol=1e-5)
    expected = compute.answer(**case.task)
    assert {**answer, "logits": None} == {**expected, "logits": None}
