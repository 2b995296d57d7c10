"""Optimizers other than AdamW equal a single process, and resume after an interruption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.invariant import reference
from tests.invariant.conftest import Material
from tests.invariant.group import Arrays, Outcome, assert_close, run_group
from tests.invariant.test_equivalence import assert_same_training, task_of

pytestmark = pytest.mark.distributed

# In bf16, rounding of the updates exceeds the tolerances with a learning rate of 0.01, but not with 0.001.
MUON: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": "muon", "muon_lr": 0.01},
    "bf16": {"optimizer": "muon", "muon_lr": 0.001},
}
# test_methods.py runs every optimizer with every ZeRO stage for two steps; here some run longer.
MUON_CELLS = ("muon zero2", "muon zero3", "muon-bf16 zero2")
PAGED = ("paged_adamw zero0", "paged_adamw zero3")
EIGHT_BITS = ("adamw_8bit zero2", "paged_adamw_8bit zero3")
RESUMED = ("muon zero3", "adamw_8bit zero2")


def train_task(tiny: Material, name: str) -> dict[str, Any]:
    optimizer, policy = name.split()
    kind = "bf16" if optimizer == "muon-bf16" else "fp32"
    changes = MUON[kind] if optimizer.startswith("muon") else {"optimizer": optimizer}
    _, task = task_of(name, tiny, policy, "2w-1x4", checkpoint={"every_steps": 3}, **changes)
    return {**task, "newton_schulz": kind}


@pytest.fixture(scope="module")
def outcomes(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Train every case; also interrupt those in `RESUMED` after step 3 and resume them."""
    home = tmp_path_factory.mktemp("optimizers")
    tasks = [train_task(tiny, name) for name in (*MUON_CELLS, *PAGED, *EIGHT_BITS)]
    for name in RESUMED:
        task, folder = train_task(tiny, name), home / "checkpoints" / name
        tasks.append({**task, "name": f"begun {name}", "save_to": str(folder), "end_at": 3})
        tasks.append({**task, "name": f"resumed {name}", "resume": str(folder / "step-00000003")})
    return run_group(home / "group", 2, tasks)


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


@pytest.mark.parametrize("name", MUON_CELLS)
def test_muon_is_pytorchs(
    name: str, outcomes: dict[str, Outcome], expected: dict[str, reference.Reference]
) -> None:
    assert_same_training(outcomes[name], expected["bf16" if "bf16" in name else "fp32"])
    assert outcomes[name].answer["optimizer"]["type"] == "MuonWithAuxAdam"


@pytest.mark.parametrize("name", PAGED)
def test_paged_adamw_is_adamw(
    name: str, outcomes: dict[str, Outcome], expected: dict[str, reference.Reference]
) -> None:
    assert_same_training(outcomes[name], expected["adamw"])
    assert outcomes[name].answer["optimizer"]["dtypes"] == ["torch.float32"]


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
    whole, begun, resumed = outcomes[name], outcomes[f"begun {name}"], outcomes[f"resumed {name}"]
    assert (len(begun.answer["steps"]), resumed.answer["start"]) == (3, 3)
    together = begun.answer["steps"] + resumed.answer["steps"]
    for figure in ("loss", "gradient_norm", "learning_rate"):
        assert [step[figure] for step in together] == pytest.approx(
            [step[figure] for step in whole.answer["steps"]], rel=1e-6
        )
    assert_close(resumed.kind("parameter"), whole.kind("parameter"), 1e-6)
