"""Training of every architecture equals a single process, with sliding windows, soft caps and tied weights.

The single process runs transformers' eager attention on one document at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from orchestrator.config.schema import JobSpec
from tests.invariant import material, reference
from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import job

pytestmark = pytest.mark.distributed
WINDOW = 16  # tokens; a third of the documents' mean length, so that most documents are longer


@dataclass(frozen=True)
class Case:
    """An architecture, the changes to the tiny model's configuration, and how it is trained."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 2
    sequence_parallel_size: int = 1
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}-zero{self.zero_stage}-sp{self.sequence_parallel_size}"


_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
_SECOND_HALF = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_TIED = {"tie_word_embeddings": True}
CASES = [
    Case("llama", zero_stage=3),
    Case("qwen2", {**_SECOND_HALF, **_TIED}, sequence_parallel_size=2),
    Case("qwen3", {**_SECOND_HALF, "head_dim": 12}, zero_stage=3),
    Case("mistral", {"sliding_window": WINDOW}, zero_stage=3, sequence_parallel_size=2),
    Case("gemma", {**_TIED, "head_dim": 16}, model={"gradient_checkpointing": True}),
    Case(
        "gemma2", {**_CAPS, **_TIED, "sliding_window": WINDOW, "head_dim": 16}, zero_stage=3,
        sequence_parallel_size=2, model={"gradient_checkpointing": True},
    ),
    Case("gemma2", {**_CAPS, **_TIED, "sliding_window": WINDOW, "head_dim": 16}),
    Case(
        "gemma3_text",
        {
            **_TIED, "sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        sequence_parallel_size=2,
    ),
    Case("phi3", {"sliding_window": WINDOW}),
]  # fmt: skip


def task_of(tiny: Material, home: Any, case: Case) -> dict[str, Any]:
    parallel = {"zero_stage": case.zero_stage, "sequence_parallel_size": case.sequence_parallel_size}
    return {
        "name": case.name,
        "action": "train",
        "job": job(
            home / case.name, 2, parallel, data={"packing": "best_fit"}, model=case.model,
            global_batch_size=2, max_steps=3,
        ),
        "data": str(tiny.training),
        "parameters": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("architectures")
    for case in CASES:
        material.write_model_of(case.family, folder / case.name, **case.config)
    return folder


@pytest.fixture(scope="module")
def outcomes(tiny: Material, home: Any) -> dict[str, Outcome]:
    return run_group(home / "group", 2, [task_of(tiny, home, case) for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_trains_as_in_one_plain_process(
    case: Case, tiny: Material, home: Any, outcomes: dict[str, Outcome]
) -> None:
    expected = reference.train(task_of(tiny, home, case)["job"], tiny.training)
    outcome = outcomes[case.name]
    steps = outcome.answer["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(expected.gradient_norms, rel=1e-4)
    assert_close(outcome.kind("gradient"), expected.gradients, 1e-4)
    assert_close(outcome.kind("parameter"), expected.parameters, 1e-4)
    assert ("lm_head.weight" in expected.parameters) != case.config.get("tie_word_embeddings", False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2-zero2-sp2", {"sliding_window": None}),
        ("mistral-zero3-sp2", {"sliding_window": WINDOW + 1}),
        ("gemma2-zero2-sp1", {"sliding_window": WINDOW - 1}),
        ("gemma2-zero2-sp1", {"attn_logit_softcapping": None}),
        ("gemma3_text-zero2-sp2", {"sliding_window": 512}),
    ],
)
def test_the_comparison_sees_a_window_of_another_size_or_none(
    name: str, changes: dict[str, Any], tiny: Material, home: Any, outcomes: dict[str, Outcome], tmp_path: Any
) -> None:
    case = next(case for case in CASES if case.name == name)
    material.write_model_of(case.family, tmp_path / "model", **{**case.config, **changes})
    document = task_of(tiny, home, case)["job"]
    document["model"]["path"], document["optim"]["max_steps"] = str(tmp_path / "model"), 1
    other = reference.train(document, tiny.training)
    found = outcomes[name]
    assert found.answer["steps"][0]["loss"] != pytest.approx(other.losses[0], rel=1e-5)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(found.kind("gradient"), other.gradients, 1e-4)


def test_most_documents_are_longer_than_the_window(tiny: Material, home: Any) -> None:
    document = JobSpec.model_validate_json(json.dumps(task_of(tiny, home, CASES[0])["job"]))
    corpus, _ = material.planned(document, tiny.training)
    assert np.mean(corpus.lengths > WINDOW) > 0.7
