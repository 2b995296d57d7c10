"""Optimizers other than AdamW train as they do in one plain process, and go on after an interruption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.invariant import reference
from tests.invariant.conftest import Material
from tests.invariant.group import Arrays, Outcome, assert_close, run_group
from tests.invariant.test_equivalence import assert_same_training, run_all, task_of

pytestmark = pytest.mark.distributed

STAGES = ("zero0", "zero1", "zero2", "zero3")
# Steps of 0.01 differ by rounding where they are made in bf16, by more than the comparison allows; those of
# 0.001 do not.
MUON: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": "muon", "muon_lr": 0.01},
    "bf16": {"optimizer": "muon", "muon_lr": 0.001},
}
MUON_CELLS = [
    *(("fp32", stage, "2w-1x4") for stage in STAGES),
    ("fp32", "zero0", "8x1"), ("fp32", "zero2", "8x1"), ("fp32", "zero3", "8x1"), ("bf16", "zero2", "2w-1x4"),
]  # fmt: skip
EIGHT_BITS = ("adamw_8bit zero1", "adamw_8bit zero3", "paged_adamw_8bit zero2")
RESUMED = ("muon zero2", "muon zero3", "adamw_8bit zero0", "adamw_8bit zero2", "adamw_8bit zero3")


def changes_of(optimizer: str) -> dict[str, Any]:
    return MUON["fp32"] if optimizer == "muon" else {"optimizer": optimizer}


@pytest.fixture(scope="module")
def outcomes(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    home = tmp_path_factory.mktemp("optimizers")
    tasks = []
    for dtype, policy, shape in MUON_CELLS:
        workers, task = task_of(f"{dtype} {policy} {shape}", tiny, policy, shape, **MUON[dtype])
        tasks.append((workers, {**task, "newton_schulz": dtype}))
    for name in (*(f"paged_adamw {stage}" for stage in STAGES), *EIGHT_BITS):
        optimizer, policy = name.split()
        tasks.append(task_of(name, tiny, policy, "2w-1x4", optimizer=optimizer))
    for name in RESUMED:
        optimizer, policy = name.split()
        for part, more in (("whole", {}), ("begun", {"save_to": str(home / name), "end_at": 3})):
            changes = {"checkpoint": {"every_steps": 3}, **changes_of(optimizer)}
            workers, task = task_of(f"{part} {name}", tiny, policy, "2w-1x4", **changes)
            tasks.append((workers, {**task, **more, "newton_schulz": "fp32"}))
    found = run_all(home, tasks)
    later = []
    for name in RESUMED:
        begun = next(task for _, task in tasks if task["name"] == f"begun {name}")
        rest = {key: value for key, value in begun.items() if key not in ("save_to", "end_at")}
        later.append({**rest, "name": f"resumed {name}", "resume": str(home / name / "step-00000003")})
    return found | run_group(home / "later", 2, later)


@pytest.fixture(scope="module")
def expected(tiny: Material) -> dict[str, reference.Reference]:
    jobs = {dtype: task_of("", tiny, "zero2", "1x8", **changes)[1]["job"] for dtype, changes in MUON.items()}
    with reference.muon_in_fp32():
        in_fp32 = reference.train(jobs["fp32"], tiny.training)
    adamw = task_of("", tiny, "zero2", "1x8")[1]["job"]
    return {
        "fp32": in_fp32,
        "bf16": reference.train(jobs["bf16"], tiny.training),
        "adamw": reference.train(adamw, tiny.training),
    }


@pytest.mark.parametrize(("dtype", "policy", "shape"), MUON_CELLS)
def test_muon_is_pytorchs(
    dtype: str,
    policy: str,
    shape: str,
    outcomes: dict[str, Outcome],
    expected: dict[str, reference.Reference],
) -> None:
    outcome = outcomes[f"{dtype} {policy} {shape}"]
    assert_same_training(outcome, expected[dtype])
    assert outcome.answer["optimizer"]["type"] == "MuonWithAuxAdam"


@pytest.mark.parametrize("policy", STAGES)
def test_paged_adamw_is_adamw(
    policy: str, outcomes: dict[str, Outcome], expected: dict[str, reference.Reference]
) -> None:
    outcome = outcomes[f"paged_adamw {policy}"]
    assert_same_training(outcome, expected["adamw"])
    assert outcome.answer["optimizer"]["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bits_stay_near_adamw(
    name: str, outcomes: dict[str, Outcome], expected: dict[str, reference.Reference]
) -> None:
    outcome, adamw = outcomes[name], expected["adamw"]
    assert outcome.answer["optimizer"]["dtypes"] == ["torch.uint8"]
    assert_close(outcome.kind("gradient"), adamw.gradients, 1e-4)
    losses = [step["loss"] for step in outcome.answer["steps"]]
    assert losses == pytest.approx(adamw.losses, rel=1e-3)
    way = _distance(adamw.parameters, outcome.kind("initial"))
    assert 1e-6 < _distance(outcome.kind("parameter"), adamw.parameters) / way < 0.1


def _distance(one: Arrays, other: Arrays) -> float:
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(name: str, outcomes: dict[str, Outcome]) -> None:
    whole, begun, resumed = (outcomes[f"{part} {name}"] for part in ("whole", "begun", "resumed"))
    assert (len(begun.answer["steps"]), resumed.answer["start"]) == (3, 3)
    together = begun.answer["steps"] + resumed.answer["steps"]
    for figure in ("loss", "gradient_norm", "learning_rate"):
        assert [step[figure] for step in together] == pytest.approx(
            [step[figure] for step in whole.answer["steps"]], rel=1e-6
        )
    assert_close(resumed.kind("parameter"), whole.kind("parameter"), 1e-6)
