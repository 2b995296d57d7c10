"""LoRA under every parallel layout equals peft in a single process, and changes no frozen weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError, TrainingError
from orchestrator.export.adapter import merged_model, write_adapter
from orchestrator.export.export import ExportRequest, export, fp32_weights
from orchestrator.model.base_model_id import identity
from orchestrator.model.build import require_supported
from tests.exports.runs import TOKENIZER
from tests.invariant import material, reference
from tests.invariant.conftest import Material
from tests.invariant.group import Arrays, Outcome, assert_close, run_group
from tests.invariant.material import POLICIES, SEED, job

pytestmark = pytest.mark.distributed

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "attention": {"rank": 3, "alpha": 8.0, "target_modules": "attention"},
    "named": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"rank": 4, "alpha": 8.0, "use_dora": True},
    "embeddings": {"rank": 4, "alpha": 8.0, "train_embeddings": True},
}
# Method, ZeRO policy, sequence_parallel_size, and fields of `model` that must not change the result.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "lora-zero0": ("lora", "zero0", 1, {}),
    "lora-zero2": ("lora", "zero2", 1, {}),
    "lora-zero3": ("lora", "zero3", 1, {}),
    "lora-zero2-sp2": ("lora", "zero2", 2, {"gradient_checkpointing": "full"}),
    "lora-zero3-sp2": ("lora", "zero3", 2, {"gradient_checkpointing": "full", "loss_tile_tokens": 16}),
    "lora-zero3-all-cpu": ("lora", "zero3-all-cpu", 1, {"mlp_tile_tokens": 40}),
    "attention-zero2": ("attention", "zero2", 1, {}),
    "named-zero3": ("named", "zero3", 1, {}),
    "dora-zero2": ("dora", "zero2", 1, {}),
    "dora-zero3": ("dora", "zero3", 1, {}),
    "embeddings-zero2-sp2": ("embeddings", "zero2", 2, {}),
    "embeddings-zero3": ("embeddings", "zero3", 1, {}),
}


RESUMED = ("lora-zero0", "embeddings-zero2-sp2", "lora-zero3-all-cpu", "embeddings-zero3")


def task_of(tiny: Material, name: str) -> dict[str, Any]:
    method, policy, size, model = CASES[name]
    parallel = {**POLICIES[policy], "sequence_parallel_size": size}
    return {
        "name": name,
        "action": "train",
        "job": job(
            tiny.model, 2, parallel, method={"type": "lora", **METHODS[method]}, model=model,
            data={"packing": "best_fit"}, eval={"every_steps": 4}, global_batch_size=2, max_steps=4,
            lr=1e-2, warmup_ratio=0.0,
        ),
        "data": str(tiny.training),
        "held_out": str(tiny.held_out),
        "initial": True,
        "parameters": True,
    }  # fmt: skip


def plain_peft(model: Any, method: dict[str, Any]) -> Any:
    """Add adapters to a model with peft only."""
    from peft import LoraConfig, get_peft_model

    chosen = method.get("target_modules", "all-linear")
    torch.manual_seed(SEED)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=method["rank"],
            lora_alpha=method["alpha"],
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if chosen == "attention" else chosen,
            use_rslora=method.get("use_rslora", False),
            use_dora=method.get("use_dora", False),
            modules_to_save=["embed_tokens", "lm_head"] if method.get("train_embeddings") else None,
        ),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def outcomes(tiny: Material, home: Path) -> dict[str, Outcome]:
    """Train every case; also interrupt those in `RESUMED` after step 2 and resume them."""
    tasks = [task_of(tiny, name) for name in CASES]
    for name in RESUMED:
        folder = str(home / "checkpoints" / name)
        task = task_of(tiny, name)
        task["job"]["checkpoint"] = {"every_steps": 2}
        stopped = {**task, "name": f"{name} stopped", "save_to": folder, "end_at": 2}
        again = {**task, "name": f"{name} resumed", "save_to": folder}
        tasks += [stopped, {**again, "resume": f"{folder}/step-00000002"}]
    return run_group(home / "group", 2, tasks)


@pytest.fixture(scope="module")
def expected(tiny: Material) -> dict[str, reference.Reference]:
    return {
        method: reference.train(
            task_of(tiny, next(name for name, case in CASES.items() if case[0] == method))["job"],
            tiny.training,
            tiny.held_out,
            lambda model, method=method: plain_peft(model, METHODS[method]),
        )
        for method in METHODS
    }


def without_zeros(arrays: Arrays) -> Arrays:
    """Drop arrays that are all zero: lora_B starts at zero, so the first gradient of lora_A is zero."""
    return {name: array for name, array in arrays.items() if np.any(array)}


@pytest.mark.parametrize("name", CASES)
def test_adapters_train_as_peft_does_in_one_plain_process(
    name: str, outcomes: dict[str, Outcome], expected: dict[str, reference.Reference]
) -> None:
    outcome, plain = outcomes[name], expected[CASES[name][0]]
    steps = outcome.answer["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(plain.losses, rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(plain.gradient_norms, rel=1e-4)
    assert_close(without_zeros(outcome.kind("gradient")), without_zeros(plain.gradients), 1e-4)
    # lora_B starts at zero, so Adam divides by square roots close to zero in the first steps.
    assert_close(outcome.kind("parameter"), plain.parameters, 5e-4)
    assert outcome.answer["evaluations"][-1][1] == pytest.approx(plain.evaluation, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_to_the_bit(name: str, outcomes: dict[str, Outcome]) -> None:
    before, after = outcomes[name].kind("initial"), outcomes[name].kind("parameter")
    trained = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    marks = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".modules_to_save.")
    assert trained == {name for name in after if any(mark in name for mark in marks)}
    assert trained == outcomes[name].kind("gradient").keys()
    saved = {name for name in trained if ".modules_to_save." in name}
    assert len(saved) == (2 if METHODS[CASES[name][0]].get("train_embeddings") else 0)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_of_adapters_goes_on_where_it_stopped(name: str, outcomes: dict[str, Outcome]) -> None:
    whole, resumed = outcomes[name], outcomes[f"{name} resumed"]
    assert resumed.answer["start"] == 2
    steps = whole.answer["steps"][2:]
    assert [step["loss"] for step in resumed.answer["steps"]] == pytest.approx(
        [step["loss"] for step in steps], rel=1e-6
    )
    assert_close(resumed.kind("parameter"), whole.kind("parameter"), 1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_holds_no_frozen_weight(name: str, home: Path, outcomes: dict[str, Outcome]) -> None:
    saved = fp32_weights(home / "checkpoints" / name / "step-00000004")
    assert saved.keys() == outcomes[name].kind("gradient").keys()


@pytest.mark.parametrize("name", RESUMED)
def test_the_exported_adapter_and_the_merged_model_compute_what_the_run_did(
    name: str, tiny: Material, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = JobSpec.model_validate_json(json.dumps(task_of(tiny, name)["job"]))
    saved = home / "checkpoints" / name / "step-00000004"
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tiny.model)
    for folder, merge in (("adapter", False), ("merged", True)):
        export(ExportRequest(job, tmp_path / "run", saved, "fp32", identity(job), merge), tmp_path / folder)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)

    trained = plain_peft(base(), METHODS[CASES[name][0]]).eval()
    parameters = outcomes[name].kind("parameter")
    trained.load_state_dict({key: torch.from_numpy(value) for key, value in parameters.items()}, strict=False)
    adapted = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 50)[None]
    with torch.no_grad():
        plain, found = base().eval()(ids).logits, trained(ids).logits
        torch.testing.assert_close(adapted(ids).logits, found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged(ids).logits, found, rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 0.1


def test_an_adapter_is_not_merged_into_another_base(
    tiny: Material, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    document = task_of(tiny, "lora-zero0")["job"]
    job = JobSpec.model_validate_json(json.dumps(document))
    weights = fp32_weights(home / "checkpoints" / "lora-zero0" / "step-00000004")
    write_adapter(job, weights, tmp_path, torch.float32, identity(job))
    material.write_model(tmp_path / "other", rms_norm_eps=1e-6)
    document["model"]["path"] = str(tmp_path / "other")
    other = JobSpec.model_validate_json(json.dumps(document))
    with pytest.raises(
        TrainingError, match=r"is not the base model that the adapter was trained with \(config"
    ):
        merged_model(other, tmp_path, torch.float32)


def test_an_adapter_is_gone_on_from(
    tiny: Material, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    """A new run with `method.adapter` starts with the trained adapter weights, under any ZeRO stage."""
    document = task_of(tiny, "embeddings-zero3")["job"]
    first = JobSpec.model_validate_json(json.dumps(document))
    saved = home / "checkpoints" / "embeddings-zero3" / "step-00000004"
    write_adapter(first, fp32_weights(saved), tmp_path, torch.float32, identity(first))
    cases = ("embeddings-zero2-sp2", "embeddings-zero3")
    tasks = []
    for name in cases:
        task = task_of(tiny, name)
        task["job"]["method"]["adapter"] = str(tmp_path)
        task["job"]["optim"]["max_steps"] = 1
        tasks.append(task)
        require_supported(JobSpec.model_validate_json(json.dumps(task["job"])))
    found = run_group(tmp_path / "group", 2, tasks)
    trained = outcomes["embeddings-zero3"].kind("parameter")
    for name in cases:
        assert_close(found[name].kind("initial"), trained, 1e-7)
    new = outcomes["embeddings-zero3"].answer["steps"][0]["loss"]
    assert found[cases[0]].answer["steps"][0]["loss"] < new - 0.01


def test_an_adapter_that_does_not_fit_is_refused_before_the_start(
    tiny: Material, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    document = task_of(tiny, "lora-zero0")["job"]
    job = JobSpec.model_validate_json(json.dumps(document))
    weights = fp32_weights(home / "checkpoints" / "lora-zero0" / "step-00000004")
    write_adapter(job, weights, tmp_path, torch.float32, identity(job))
    material.write_model(tmp_path / "other", rms_norm_eps=1e-6)

    def refusal(path: str = str(tmp_path), model: str | None = None, **method: Any) -> str:
        changed = {**document, "method": {**document["method"], "adapter": path, **method}}
        changed["model"] = {**document["model"], "path": model or document["model"]["path"]}
        with pytest.raises(SpecError) as caught:
            require_supported(JobSpec.model_validate_json(json.dumps(changed)))
        (problem,) = caught.value.problems
        return problem

    assert "rank 4, and method.rank is 8" in refusal(rank=8)
    assert "alpha 8.0, and method.alpha is 2.0" in refusal(alpha=2.0)
    assert "does not match method.target_modules" in refusal(target_modules=["q_proj"])
    assert "does not match method.target_modules" in refusal(train_embeddings=True)
    assert "was trained with another base model" in refusal(model=str(tmp_path / "other"))
    assert "is not an adapter that can be read" in refusal(path=str(tmp_path / "other"))
