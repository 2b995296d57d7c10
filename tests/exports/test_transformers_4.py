"""Exports load in transformers 4 and compute there what the checkpoint does here.

    python -m venv old && old/bin/pip install torch transformers==4.56.2 "peft<0.19" accelerate
    ORCHESTRATOR_TRANSFORMERS_4=old/bin/python pytest tests/exports/test_transformers_4.py

docs/exports.md records the figures of such a run.
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
    """Let the other environment load every export."""
    home = tmp_path_factory.mktemp("transformers-4")
    (home / "tasks.json").write_text(json.dumps({name: each.task for name, each in exported.items()}))
    command = [str(PYTHON), compute.__file__, str(home / "tasks.json"), str(home / "answers.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules")}
    subprocess.run(command, check=True, cwd=Path(home), env=environment, timeout=500)
    found: dict[str, Any] = json.loads((home / "answers.json").read_text())
    return found


def test_it_is_transformers_4(answers: dict[str, Any]) -> None:
    assert answers["transformers"].startswith("4.")


@pytest.mark.parametrize("name", CASES)
def test_transformers_4_computes_what_the_checkpoint_does(
    name: str, exported: dict[str, Exported], answers: dict[str, Any], record_property: Any
) -> None:
    answer, found = answers[name], exported[name]
    assert "error" not in answer, answer
    logits = torch.tensor(answer["logits"])
    record_property("largest difference", (logits - found.logits).abs().max().item())
    torch.testing.assert_close(logits, found.logits, rtol=1e-5, atol=1e-5)
    here = compute.answer(**found.task)
    assert {**answer, "logits": None} == {**here, "logits": None}
