"""Adapters of quantized base models: losses equal to peft's in one process, training, resuming, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config.schema import JobSpec
from orchestrator.export.adapter import merged_model, write_adapter
from orchestrator.export.export import fp32_weights
from orchestrator.model.base_model_id import identity
from orchestrator.model.build import base_model
from orchestrator.model.quantization import disable_cpu_repacking
from tests.invariant import material, reference
from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, run_group
from tests.invariant.material import POLICIES, SEED, job

pytestmark = pytest.mark.distributed

METHOD = {"type": "lora", "rank": 8, "alpha": 16.0}
CASES = {
    "nf4-zero2": ("nf4", "zero2", 1),
    "nf4-zero3": ("nf4", "zero3", 1),
    "nf4-zero3-sp2": ("nf4", "zero3", 2),
    "int8-zero2": ("int8", "zero2", 1),
}
RANDOM = {"random-nf4-zero3": ("nf4", "zero3", 1), "random-int8-zero2": ("int8", "zero2", 1)}
STEPS = 12
HALF = 6


def task_of(tiny: Material, home: Path, name: str) -> dict[str, Any]:
    bits, policy, size = CASES[name]
    return {
        "name": name,
        "action": "train",
        "job": job(
            tiny.model, 2, {**POLICIES[policy], "sequence_parallel_size": size},
            method={**METHOD, "quantization": bits}, data={"packing": "best_fit"},
            checkpoint={"every_steps": HALF}, eval={"every_steps": HALF},
            global_batch_size=4, max_steps=STEPS, lr=2e-2, warmup_ratio=0.0,
        ),
        "data": str(home / "documents"),
        "held_out": str(tiny.held_out),
        "parameters": True,
    }  # fmt: skip


def plain_peft(path: Path, bits: str) -> Any:
    """Load a quantized base model and add adapters, with transformers and peft only."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=nf4 if bits == "nf4" else BitsAndBytesConfig(load_in_8bit=True),
    )
    disable_cpu_repacking(base)
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16.0, target_modules="all-linear")
    return get_peft_model(base, config).train()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    material.write_documents(folder / "documents", 8, seed=1)
    return folder


@pytest.fixture(scope="module")
def outcomes(tiny: Material, home: Path) -> dict[str, Outcome]:
    tasks = []
    for name in CASES:
        folder, task = str(home / "checkpoints" / name), task_of(tiny, home, name)
        stopped = {**task, "name": f"{name} stopped", "save_to": folder, "end_at": HALF}
        resumed = {**task, "name": f"{name} resumed", "save_to": folder}
        tasks += [task, stopped, {**resumed, "resume": f"{folder}/step-{HALF:08d}"}]
    for name, (bits, policy, _) in RANDOM.items():
        task = task_of(tiny, home, "nf4-zero2")
        document = task["job"]
        document["parallel"].update(POLICIES[policy])
        document["optim"]["max_steps"] = 2
        document["method"] = METHOD
        document["model"]["weights"] = "random"
        drawn = base_model(JobSpec.model_validate_json(json.dumps(document)), torch.float32)
        drawn.save_pretrained(home / name)
        document["method"] = {**METHOD, "quantization": bits}
        read = {**document, "model": {**document["model"], "path": str(home / name), "weights": "pretrained"}}
        tasks += [{**task, "name": name}, {**task, "name": f"{name} read", "job": read}]
    return run_group(home / "group", 2, tasks)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_peft_does_in_one_plain_process(
    name: str, tiny: Material, home: Path, outcomes: dict[str, Outcome]
) -> None:
    task, bits = task_of(tiny, home, name), CASES[name][0]
    task["job"]["optim"]["max_steps"] = 1
    expected = reference.train(
        task["job"], home / "documents", adapt=lambda model: plain_peft(tiny.model, bits)
    )
    steps = outcomes[name].answer["steps"][:1]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses[:1], rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(expected.gradient_norms[:1], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_it_learns(name: str, outcomes: dict[str, Outcome]) -> None:
    losses = [step["loss"] for step in outcomes[name].answer["steps"]]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert [step for step, _ in outcomes[name].answer["evaluations"]] == [HALF, STEPS]


@pytest.mark.parametrize("name", CASES)
def test_only_adapters_have_optimizer_state(name: str, outcomes: dict[str, Outcome]) -> None:
    """Partitions of all ranks have the same size, so they may end with padding."""
    trained = sum(array.size for array in outcomes[name].kind("gradient").values())
    held = sum(answer["optimizer_elements"] for answer in outcomes[name].ranks)
    assert trained <= held <= trained + 64


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_where_it_stopped(name: str, outcomes: dict[str, Outcome]) -> None:
    whole, resumed = outcomes[name].answer["steps"], outcomes[f"{name} resumed"].answer["steps"]
    assert [step["loss"] for step in resumed] == pytest.approx([s["loss"] for s in whole[HALF:]], rel=1e-5)


@pytest.mark.parametrize("name", ["nf4-zero2", "nf4-zero3", "int8-zero2"])
def test_the_merged_model_computes_what_the_run_did(
    name: str, tiny: Material, home: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    job = JobSpec.model_validate_json(json.dumps(task_of(tiny, home, name)["job"]))
    saved = home / "checkpoints" / name / f"step-{STEPS:08d}"
    for folder in ("adapter", "merged"):
        (tmp_path / folder).mkdir()
    weights = fp32_weights(saved)
    write_adapter(job, weights, tmp_path / "adapter", torch.float32, identity(job))
    merged_model(job, tmp_path / "adapter", torch.float32).save_pretrained(tmp_path / "merged")
    trained = plain_peft(tiny.model, CASES[name][0]).eval()
    state = {key: weight.contiguous() for key, weight in weights.items()}
    assert not trained.load_state_dict(state, strict=False).unexpected_keys
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not getattr(merged, "is_quantized", False)
    ids = torch.arange(3, 50)[None]
    with torch.no_grad():
        off = (merged(ids).logits - trained(ids).logits).norm() / trained(ids).logits.norm()
    # int8 quantizes activations as well; the merged model does not.
    assert off < (1e-4 if CASES[name][0] == "nf4" else 3e-2)


def test_few_bits_do_change_the_model(tiny: Material, outcomes: dict[str, Outcome]) -> None:
    first = {name: outcomes[name].answer["steps"][0]["loss"] for name in CASES}
    assert first["nf4-zero2"] != pytest.approx(first["int8-zero2"], rel=1e-4)


@pytest.mark.parametrize("name", RANDOM)
def test_random_weights_are_quantised_as_those_that_are_read(name: str, outcomes: dict[str, Outcome]) -> None:
    drawn, read = outcomes[name].answer["steps"], outcomes[f"{name} read"].answer["steps"]
    assert [step["loss"] for step in drawn] == pytest.approx([step["loss"] for step in read], rel=1e-6)
