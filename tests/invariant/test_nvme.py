"""NVMe offloading does not change training, including runs that were interrupted and resumed.

DeepSpeed swaps only tensors of at least 1 MiB, so the model is wider than in other tests. Sub-groups are
small, so that there are several, one of which stays in memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.manifest import MANIFEST, read_manifest
from orchestrator.export.export import fp32_weights
from tests.invariant import material, reference
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.test_equivalence import assert_same_training

_CACHE = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
needs_async_io = pytest.mark.skipif(
    not (_CACHE / "async_io" / "async_io.so").exists(),
    reason="DeepSpeed's async_io is not compiled here; it needs libaio-dev and some minutes: "
    "python -m orchestrator.engine.deepspeed_ops nvme",
)
pytestmark = [pytest.mark.distributed, needs_async_io]
SIZES = {"hidden_size": 512, "intermediate_size": 1024}  # an MLP weight has 2 MiB in fp32
ON_CPU = "zero3-all-cpu"
POLICIES = {
    "zero3-optimizer-nvme": {"offload_optimizer": "nvme"},
    "zero3-param-cpu-optimizer-nvme": {"offload_optimizer": "nvme", "offload_param": "cpu"},
    "zero3-all-nvme": {"offload_optimizer": "nvme", "offload_param": "nvme"},
    "zero3-param-nvme-optimizer-cpu": {"offload_optimizer": "cpu", "offload_param": "nvme"},
}
TILED = {"gradient_checkpointing": True, "mlp_tile_tokens": 16, "loss_tile_tokens": 8}
# Relative error of later steps due to Adam's rounding after a resume; larger in 16 bits, and for lora_B,
# which starts at zero.
TOLERANCE = {"bf16": 1e-3, "fp16": 1e-3, "lora": 1e-5}
LORA = {"type": "lora", "rank": 64, "dropout": 0.0}
SAVED = "step-00000002"
STEPS = 4
ROUNDED = {"bf16": 4e-3, "fp16": 5e-4}  # largest relative error between fp32 weights and 16-bit parameters


def task_of(name: str, home: Path, policy: str, disk: str = "", **more: Any) -> dict[str, Any]:
    """Return a task of four steps with two workers that swap to its own folder, or to that of task `disk`."""
    swapped = home / f"disk of {disk or name}"
    parallel: dict[str, Any] = {"zero_stage": 3, **material.POLICIES.get(policy, POLICIES.get(policy, {}))}
    if policy in POLICIES:
        parallel["offload_path"] = str(swapped)
    sections = {name: more.pop(name, {}) for name in ("method", "model")}
    document = material.job(
        home / "model", 2, parallel, max_steps=STEPS, checkpoint={"every_steps": 2}, lr=1e-4, **sections
    )
    return {
        "name": name,
        "action": "train",
        "job": document,
        "data": str(home / "documents"),
        "parameters": True,
        "swapped": str(swapped),
        "zero_optimization": {"sub_group_size": 500_000},
        "offload_param": {"buffer_size": 2**20} if parallel.get("offload_param") == "nvme" else {},
        **more,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvme")
    material.write_model(folder / "model", **SIZES, initializer_range=0.05)
    material.write_documents(folder / "documents", 40, seed=1)
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    **{policy: {"policy": policy} for policy in POLICIES},
    "recomputed in tiles": {"policy": "zero3-all-nvme", "model": TILED},
    "lora": {"policy": "zero3-param-cpu-optimizer-nvme", "method": LORA},
    "bf16": {"policy": "zero3-all-nvme", "dtype": "bf16"},
    "fp16": {"policy": "zero3-all-nvme", "dtype": "fp16"},
}
# Runs without NVMe that resume from a checkpoint written without NVMe.
IN_MEMORY = {
    f"{name} in memory": {**VARIANTS[name], "policy": ON_CPU} for name in ("zero3-all-nvme", "bf16", "fp16")
}
MEMORY = "zero3-all-nvme in memory"
STALE = ("zero3-optimizer-nvme", "zero3-all-nvme", "bf16")


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, Outcome]:
    tasks = [task_of(f"whole {name}", home, **variant) for name, variant in VARIANTS.items()]
    tasks += [
        task_of(f"begun {name}", home, **variant, save_to=str(home / name), end_at=2)
        for name, variant in {**VARIANTS, **IN_MEMORY}.items()
    ]
    return run_group(home / "before", 2, tasks, 500)


@pytest.fixture(scope="module")
def resumed(home: Path, outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """Resume with an empty swap folder, and with one that contains files of a longer run."""
    tasks = []
    for name, variant in {**VARIANTS, **IN_MEMORY}.items():
        saved = str(home / name / SAVED)
        tasks.append(task_of(f"empty {name}", home, **variant, resume=saved))
        if name in STALE:
            tasks.append(task_of(f"stale {name}", home, **variant, resume=saved, disk=f"whole {name}"))
    there, here = (str(home / name / SAVED) for name in ("zero3-all-nvme", MEMORY))
    tasks.append(task_of("from disk", home, ON_CPU, resume=there))
    tasks.append(task_of("from memory", home, "zero3-all-nvme", resume=here))
    other = {"sub_group_size": 10**8}
    tasks.append(task_of("other sub-groups", home, "zero3-all-nvme", resume=here, zero_optimization=other))
    cases = [
        {"name": "good", "folder": str(home / "saves")},
        {
            "name": "lost",
            "folder": str(home / "saves"),
            "lose": str(home / "disk of saves"),
            "full_on_rank": 9,
        },
    ]
    tasks.append({**task_of("saves", home, "zero3-all-nvme"), "action": "fail_to_save", "cases": cases})
    return run_group(home / "after", 2, tasks, 500)


@pytest.fixture(scope="module")
def expected(home: Path) -> reference.Reference:
    return reference.train(task_of("", home, "zero3-all-nvme")["job"], home / "documents")


@pytest.mark.parametrize("policy", [*POLICIES, "recomputed in tiles"])
def test_a_disk_does_not_change_training(
    policy: str, outcomes: dict[str, Outcome], expected: reference.Reference
) -> None:
    assert_same_training(outcomes[f"whole {policy}"], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_state_is_on_the_disk_and_not_in_memory(policy: str, outcomes: dict[str, Outcome]) -> None:
    on_disk = POLICIES[policy]["offload_optimizer"] == "nvme"
    for answer in outcomes[f"whole {policy}"].ranks:
        assert answer["optimizer"]["type"] == "DeepSpeedCPUAdam"
        assert answer["swapped_bytes"] > 2**20
        in_memory = answer["optimizer"]["moment_bytes"] / (8 * answer["trained_of_rank"])
        assert 0 < in_memory < 0.2 if on_disk else in_memory == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_the_undisturbed_one(
    name: str, outcomes: dict[str, Outcome], resumed: dict[str, Outcome]
) -> None:
    whole, begun = outcomes[f"whole {name}"], outcomes[f"begun {name}"]
    assert_goes_on(whole, begun, resumed[f"empty {name}"], TOLERANCE.get(name, 1e-6))
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(begun.kind("parameter"), whole.kind("parameter"), 1e-6)


def assert_goes_on(whole: Outcome, begun: Outcome, rest: Outcome, relative: float) -> None:
    """Assert that an interrupted and resumed run equals the uninterrupted one.

    After a resume DeepSpeed's CPU Adam computes the powers of its betas differently, with and without NVMe,
    so the last step has a larger tolerance.
    """
    together = begun.answer["steps"] + rest.answer["steps"]
    assert [step["step"] for step in together] == list(range(1, STEPS + 1))
    for figure in ("loss", "gradient_norm"):
        found, expected = ([step[figure] for step in steps] for steps in (together, whole.answer["steps"]))
        assert found[:3] == pytest.approx(expected[:3], rel=1e-6)
        assert found == pytest.approx(expected, rel=relative)
    assert_close(rest.kind("parameter"), whole.kind("parameter"), relative)


@pytest.mark.parametrize("name", STALE)
def test_what_lies_on_the_disk_is_not_read(name: str, resumed: dict[str, Outcome]) -> None:
    assert_same(resumed[f"stale {name}"], resumed[f"empty {name}"])


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_disk_does_not_change_how_a_run_goes_on(name: str, resumed: dict[str, Outcome]) -> None:
    assert_same(resumed[f"empty {name.removesuffix(' in memory')}"], resumed[f"empty {name}"])


@pytest.mark.parametrize("task", ["from disk", "from memory"])
def test_a_checkpoint_is_the_one_of_a_run_in_memory(task: str, resumed: dict[str, Outcome]) -> None:
    assert_same(resumed[task], resumed[f"empty {MEMORY}"])


def assert_same(one: Outcome, other: Outcome) -> None:
    """Assert that two runs are bitwise equal."""
    for figure in ("loss", "gradient_norm"):
        assert [step[figure] for step in one.answer["steps"]] == [
            step[figure] for step in other.answer["steps"]
        ]
    assert_close(one.kind("parameter"), other.kind("parameter"), 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_holds_the_weights_and_nothing_else(
    name: str, home: Path, outcomes: dict[str, Outcome]
) -> None:
    saved = home / name / SAVED
    assert checkpoint_dir.verify(saved) == []
    manifest, in_memory = read_manifest(saved), read_manifest(home / MEMORY / SAVED)
    if name != "lora":
        assert manifest["tensors"].keys() == in_memory["tensors"].keys()
    assert {path.name for path in saved.iterdir()} == {
        MANIFEST,
        *(file["name"] for file in manifest["files"]),
    }
    weights = fp32_weights(saved)
    found = {key: weight.contiguous().detach().numpy() for key, weight in weights.items()}
    trained = outcomes[f"begun {name}"].kind("parameter")
    assert_close(found, {key: trained[key] for key in found}, ROUNDED.get(name, 0.0))
    assert len(found) == (28 if name == "lora" else len(trained))


def test_sub_groups_of_another_size_continue_as_well(resumed: dict[str, Outcome]) -> None:
    one, other = resumed["other sub-groups"], resumed[f"empty {MEMORY}"]
    found, expected = ([step["loss"] for step in each.answer["steps"]] for each in (one, other))
    assert found == pytest.approx(expected, rel=1e-6)  # the gradient norm is summed in another order
    assert_close(one.kind("parameter"), other.kind("parameter"), 1e-6)


def test_a_file_that_is_gone_from_the_disk_fails_the_checkpoint_on_every_rank(
    home: Path, resumed: dict[str, Outcome]
) -> None:
    for answer in resumed["saves"].ranks:
        assert answer["errors"]["good"] is None
        assert "the checkpoint of step 2 cannot be written" in answer["errors"]["lost"]
        assert "(rank 1: " in answer["errors"]["lost"]
        assert "rank 0: " not in answer["errors"]["lost"]
    assert [path.name for path in (home / "saves").iterdir()] == ["step-00000001"]
