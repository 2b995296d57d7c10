"""Training in bf16 and fp16, and the error for a NaN or infinite loss."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import POLICIES, job

pytestmark = pytest.mark.distributed

BF16 = ["zero0", "zero1", "zero2", "zero2-optimizer-cpu", "zero3", "zero3-all-cpu"]
FP16 = ["zero1", "zero2", "zero3"]
DIVERGING = ["zero0", "zero2", "zero3"]


@pytest.fixture(scope="module")
def outcomes(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    def task(name: str, policy: str, **more: Any) -> dict[str, Any]:
        optim = more.pop("optim", {})
        document = job(tiny.model, 2, POLICIES[policy], **optim)
        return {"name": name, "action": "train", "job": document, "data": str(tiny.training), **more}

    short = {"max_steps": 2, "lr": 5e-3}
    tasks = [task(f"bf16 {policy}", policy, dtype="bf16", optim=short, parameters=True) for policy in BF16]
    tasks.append(task("fp32", "zero2", optim=short, parameters=True))
    scale = {"initial_scale_power": 22, "hysteresis": 1}
    tasks += [
        task(f"fp16 {policy}", policy, dtype="fp16", fp16=scale, optim={"max_steps": 6}) for policy in FP16
    ]
    for policy in DIVERGING:
        tasks.append(task(f"diverging {policy}", policy, optim={"lr": 1e38}))
        tasks.append(task(f"diverging bf16 {policy}", policy, dtype="bf16", optim={"lr": 1e38}))
    return run_group(tmp_path_factory.mktemp("precision") / "group", 2, tasks)


@pytest.mark.parametrize("policy", BF16)
def test_bf16_trains_and_is_near_fp32(policy: str, outcomes: dict[str, Outcome]) -> None:
    steps = outcomes[f"bf16 {policy}"].answer["steps"]
    exact = outcomes["fp32"].answer["steps"]
    assert len(steps) == 2
    for step, other in zip(steps, exact, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=0.01)
        assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=0.05)
        assert not step["skipped"]
    assert_close(outcomes[f"bf16 {policy}"].kind("parameter"), outcomes["fp32"].kind("parameter"), 0.015)


def test_bf16_without_partitions_is_bf16_with_them(outcomes: dict[str, Outcome]) -> None:
    whole, partitioned = (outcomes[f"bf16 {policy}"].kind("parameter") for policy in ("zero0", "zero1"))
    assert_close(whole, partitioned, 1e-4)


@pytest.mark.parametrize("policy", FP16)
def test_fp16_skips_steps_until_its_scale_fits(policy: str, outcomes: dict[str, Outcome]) -> None:
    steps = outcomes[f"fp16 {policy}"].answer["steps"]
    skipped = [step["skipped"] for step in steps]
    assert skipped[0]
    assert not all(skipped)
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert [math.isfinite(step["gradient_norm"]) for step in steps] == [not skip for skip in skipped]
    exact = outcomes["fp32"].answer["steps"][0]["loss"]
    assert steps[0]["loss"] == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dtype", ["", "bf16 "])
@pytest.mark.parametrize("policy", DIVERGING)
def test_a_number_that_is_none_ends_training(policy: str, dtype: str, outcomes: dict[str, Outcome]) -> None:
    for answer in outcomes[f"diverging {dtype}{policy}"].ranks:
        (problem,) = answer["problems"]
        assert "at step 2" in problem
        assert "lower optim.lr" in problem
        assert [step["step"] for step in answer["steps"]] == [1, 2]
