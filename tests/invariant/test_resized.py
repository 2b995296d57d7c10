"""A model with resized embeddings trains like one that was resized and saved before the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.schema import JobSpec
from orchestrator.export.export import ExportRequest, export
from orchestrator.model.base_model_id import identity
from tests.invariant import material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import VOCABULARY

pytestmark = pytest.mark.distributed

TOKENS = VOCABULARY + 5
LORA = {"type": "lora", "rank": 4, "train_embeddings": True}
# Fields of `method`, the ZeRO stage, and whether embedding and LM head are tied.
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "full-zero0": ({}, 0, False),
    "full-zero2": ({}, 2, False),
    "full-zero3": ({}, 3, False),
    "tied-zero2": ({}, 2, True),
    "tied-zero3": ({}, 3, True),
    "lora-zero2": (LORA, 2, False),
    "lora-zero3": (LORA, 3, False),
    "nf4-zero3": ({**LORA, "quantization": "nf4"}, 3, False),
}
GROWN_BEFORE = {"full": "full-zero2", "tied": "tied-zero2", "lora": "lora-zero2", "nf4": "nf4-zero3"}
RESUMED = ("full-zero3", "lora-zero3")


def write_grown(folder: Path, is_tied: bool) -> None:
    """Write the tiny model with embedding and head extended from VOCABULARY to TOKENS rows.

    New rows are the mean of the old ones.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    old = LlamaForCausalLM.from_pretrained(folder / "small")
    config = LlamaConfig(**{**material.CONFIG, "vocab_size": TOKENS, "tie_word_embeddings": is_tied})
    new = LlamaForCausalLM(config)
    state = old.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = state[name].mean(dim=0, keepdim=True)
        state[name] = torch.cat([state[name], mean.repeat(TOKENS - VOCABULARY, 1)])
    new.load_state_dict(state)
    new.save_pretrained(folder / "grown")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("resized")
    for name, is_tied in (("tied", True), ("untied", False)):
        material.write_model(home / name / "small", tie_word_embeddings=is_tied)
        material.write_tokenizer(home / name / "small", TOKENS)
        write_grown(home / name, is_tied)
    material.write_documents(home / "training", 68, seed=3, vocabulary=TOKENS)
    return home


def task_of(home: Path, case: str, name: str, size: str = "small") -> dict[str, Any]:
    method, stage, is_tied = CASES[case]
    return {
        "name": name,
        "action": "train",
        "job": material.job(
            home / ("tied" if is_tied else "untied") / size, 2, {"zero_stage": stage}, method=method,
            model={"resize_embeddings": size == "small"}, data={"packing": "best_fit"},
            global_batch_size=2, max_steps=3, lr=1e-2, warmup_ratio=0.0,
        ),
        "data": str(home / "training"),
        "initial": True,
        "parameters": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, Outcome]:
    tasks = [task_of(home, case, case) for case in CASES]
    tasks += [task_of(home, case, name, "grown") for name, case in GROWN_BEFORE.items()]
    for case in RESUMED:
        folder = str(home / "checkpoints" / case)
        task = task_of(home, case, case)
        task["job"]["checkpoint"] = {"every_steps": 1}
        tasks.append({**task, "name": f"{case} stopped", "save_to": folder, "end_at": 2})
        again = {**task, "name": f"{case} resumed", "save_to": folder}
        tasks.append({**again, "resume": f"{folder}/step-00000002"})
    return run_group(home / "group", 2, tasks)


@pytest.mark.parametrize("case", CASES)
def test_it_starts_and_learns_as_a_model_that_was_grown_before(
    case: str, outcomes: dict[str, Outcome]
) -> None:
    found, expected = outcomes[case], outcomes[case.partition("-")[0]]
    before, wanted = found.kind("initial"), expected.kind("initial")
    tables = [name for name, array in before.items() if len(array) == TOKENS]
    assert len(tables) >= (1 if CASES[case][2] else 2)
    for name in before if case != "nf4-zero3" else tables:  # packed nf4 codes cannot be compared as numbers
        np.testing.assert_allclose(before[name], wanted[name], rtol=1e-6, atol=1e-7)
    steps, of_grown = found.answer["steps"], expected.answer["steps"]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in of_grown], rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(
        [step["gradient_norm"] for step in of_grown], rel=1e-4
    )
    after, wanted = found.kind("parameter"), expected.kind("parameter")
    trained = list(found.kind("gradient"))
    assert {name for name in trained if len(after[name]) == TOKENS}
    assert_close({n: after[n] for n in trained}, {n: wanted[n] for n in trained}, 5e-4)
    assert any(np.any(after[name][VOCABULARY:] != before[name][VOCABULARY:]) for name in tables)


@pytest.mark.parametrize("case", RESUMED)
def test_it_resumes(case: str, outcomes: dict[str, Outcome]) -> None:
    whole, resumed = outcomes[case], outcomes[f"{case} resumed"]
    assert resumed.answer["start"] == 2
    assert resumed.answer["steps"][0]["loss"] == pytest.approx(whole.answer["steps"][2]["loss"], rel=1e-6)
    assert_close(resumed.kind("parameter"), whole.kind("parameter"), 1e-5)


def test_the_exported_model_has_the_new_rows(
    home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    task = task_of(home, "full-zero3", "unused")
    job = JobSpec.model_validate_json(json.dumps(task["job"]))
    saved = home / "checkpoints" / "full-zero3" / "step-00000003"
    export(ExportRequest(job, tmp_path / "run", saved, "fp32"), tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values())
    assert model.config.vocab_size == TOKENS
    parameters = outcomes["full-zero3 resumed"].kind("parameter")
    for name, weight in model.state_dict().items():
        np.testing.assert_allclose(weight.numpy(), parameters[name], rtol=1e-6, atol=1e-7)


def test_the_adapter_and_the_merged_model_have_the_new_rows(
    home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = JobSpec.model_validate_json(json.dumps(task_of(home, "lora-zero3", "unused")["job"]))
    saved = home / "checkpoints" / "lora-zero3" / "step-00000003"
    for folder, merge in (("adapter", False), ("merged", True)):
        export(ExportRequest(job, tmp_path / "run", saved, "fp32", identity(job), merge), tmp_path / folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.vocab_size == TOKENS
    base = AutoModelForCausalLM.from_pretrained(home / "untied" / "small", dtype=torch.float32)
    base.resize_token_embeddings(TOKENS)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(TOKENS - 40, TOKENS)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
