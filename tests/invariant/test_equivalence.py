"""Every ZeRO policy, batch shape and memory saving gives the losses and gradients of a single process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.config.schema import JobSpec
from tests.invariant import material, reference
from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import POLICIES, job, planned

pytestmark = pytest.mark.distributed


# Workers and micro_batch_size; the global batch is 8. Names are micro_batch_size x accumulation steps.
SHAPES = {"1x8": (1, 1), "8x1": (1, 8), "2x4": (1, 2), "2w-1x4": (2, 1), "2w-4x1": (2, 4)}

EVERY_POLICY_AND_SHAPE = [
    *((policy, "2w-1x4") for policy in POLICIES),
    *((policy, "1x8") for policy in POLICIES),
    ("zero2", "8x1"), ("zero3", "8x1"), ("zero3", "2x4"), ("zero2", "2w-4x1"), ("zero3-all-cpu", "2w-4x1"),
]  # fmt: skip
BOTH_SHAPES = [(policy, shape) for shape in ("1x8", "2w-1x4") for policy in ("zero2", "zero3")]
WITHOUT_CLIPPING = [("zero0", "1x8"), ("zero0", "2w-1x4"), ("zero1", "2w-1x4"), *BOTH_SHAPES]
TIED = [
    ("zero0", "2w-1x4"), ("zero1", "2w-1x4"), *BOTH_SHAPES,
    ("zero3-all-cpu", "1x8"), ("zero3-all-cpu", "2w-1x4"),
]  # fmt: skip
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "checkpointed-zero2": ("zero2", "2w-1x4", {"model": {"gradient_checkpointing": True}}),
    "checkpointed-zero3": ("zero3", "2w-1x4", {"model": {"gradient_checkpointing": True}}),
    "checkpointed-zero3-all-cpu": ("zero3-all-cpu", "8x1", {"model": {"gradient_checkpointing": True}}),
    "tiled-zero2": ("zero2", "2w-1x4", {"model": {"loss_tile_tokens": 7}}),
    "tiled-zero3": (
        "zero3",
        "2w-1x4",
        {"model": {"loss_tile_tokens": 7, "gradient_checkpointing": True}},
    ),
    "tiled-zero3-all-cpu": ("zero3-all-cpu", "8x1", {"model": {"loss_tile_tokens": 16}}),
    "selective-zero2": ("zero2", "2w-1x4", {"model": {"gradient_checkpointing": "selective"}}),
    "selective-zero3": ("zero3", "2w-1x4", {"model": {"gradient_checkpointing": "selective"}}),
    "mlp-tiled-zero2": ("zero2", "2w-1x4", {"model": {"mlp_tile_tokens": 40}}),
    "mlp-tiled-zero3": ("zero3", "2w-1x4", {"model": {"mlp_tile_tokens": 40}}),
    "mlp-tiled-checkpointed-zero3": (
        "zero3",
        "2w-1x4",
        {"model": {"mlp_tile_tokens": 40, "gradient_checkpointing": "full"}},
    ),
    "everything-zero3-all-cpu": (
        "zero3-all-cpu",
        "8x1",
        {
            "model": {"mlp_tile_tokens": 40, "loss_tile_tokens": 16, "gradient_checkpointing": "full"},
            "parallel": {"offload_activations": "cpu"},
        },
    ),
}
"""ZeRO policy, batch shape and job changes that must not change the training result, by name."""


def task_of(name: str, tiny: Material, policy: str, shape: str, **changes: Any) -> tuple[int, dict[str, Any]]:
    workers, micro_batch_size = SHAPES[shape]
    parallel = POLICIES[policy] | changes.pop("parallel", {})
    document = job(tiny.model, workers, parallel, micro_batch_size=micro_batch_size, **changes)
    return workers, {
        "name": name,
        "action": "train",
        "job": document,
        "data": str(tiny.training),
        "held_out": str(tiny.held_out),
        "initial": True,
        "parameters": True,
    }


def run_all(folder: Any, tasks: list[tuple[int, dict[str, Any]]]) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for workers in sorted({workers for workers, _ in tasks}):
        found |= run_group(
            folder / f"{workers}-workers", workers, [task for at, task in tasks if at == workers]
        )
    return found


def assert_same_training(outcome: Outcome, expected: reference.Reference) -> None:
    steps = outcome.answer["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(expected.gradient_norms, rel=1e-4)
    assert [step["learning_rate"] for step in steps] == pytest.approx(expected.learning_rates, rel=1e-12)
    assert not any(step["skipped"] for step in steps)
    assert_close(outcome.kind("gradient"), expected.gradients, 1e-4)
    assert_close(outcome.kind("parameter"), expected.parameters, 1e-4)


@pytest.fixture(scope="module")
def expected(tiny: Material) -> reference.Reference:
    _, task = task_of("", tiny, "zero2", "1x8", eval={"every_steps": 2})
    return reference.train(task["job"], tiny.training, tiny.held_out)


@pytest.fixture(scope="module")
def outcomes(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    tasks = [
        task_of(f"{policy} {shape}", tiny, policy, shape, eval={"every_steps": 2})
        for policy, shape in EVERY_POLICY_AND_SHAPE
    ]
    tasks += [
        task_of(name, tiny, policy, shape, eval={"every_steps": 2}, **changes)
        for name, (policy, shape, changes) in VARIANTS.items()
    ]
    tasks += [
        task_of(f"random {policy} {shape}", tiny, policy, shape, model={"weights": "random"}, max_steps=1)
        for policy, shape in BOTH_SHAPES
    ]
    tasks += [
        task_of(f"tied {policy} {shape}", tiny, policy, shape, model={"path": str(tiny.tied)})
        for policy, shape in TIED
    ]
    tasks += [
        task_of(f"unclipped {policy} {shape}", tiny, policy, shape, max_grad_norm=0.0)
        for policy, shape in WITHOUT_CLIPPING
    ]
    return run_all(tmp_path_factory.mktemp("equivalence"), tasks)


@pytest.mark.parametrize(
    "name", [*(f"{policy} {shape}" for policy, shape in EVERY_POLICY_AND_SHAPE), *VARIANTS]
)
def test_layout_does_not_change_training(
    name: str, outcomes: dict[str, Outcome], expected: reference.Reference
) -> None:
    assert_same_training(outcomes[name], expected)


@pytest.mark.parametrize(
    "name", [*(f"{policy} {shape}" for policy, shape in EVERY_POLICY_AND_SHAPE), *VARIANTS]
)
def test_evaluation_loss_is_that_of_single_documents(
    name: str, outcomes: dict[str, Outcome], expected: reference.Reference
) -> None:
    for answer in outcomes[name].ranks:
        (*before, (_, loss)) = answer["evaluations"]
        assert [step for step, _ in answer["evaluations"]] == [2, 4, 5]
        assert loss == pytest.approx(expected.evaluation, rel=1e-5)
        assert all(other != pytest.approx(loss, rel=1e-5) for _, other in before)


def test_the_comparison_covers_what_it_claims(
    outcomes: dict[str, Outcome], expected: reference.Reference
) -> None:
    assert all(norm > 0.5 for norm in expected.gradient_norms), "clipping takes effect in every step"
    assert len(set(expected.losses)) == len(expected.losses) >= 4
    steps = outcomes["zero2 2w-4x1"].answer["steps"]
    assert all(step["trained_tokens"][0] != step["trained_tokens"][1] for step in steps)
    first, second = steps[-1]["trained_tokens"]
    assert first > 0 == second, "the last step leaves rank 1 without anything to train on"


@pytest.mark.parametrize("name", ["zero2 2w-1x4", "zero3-all-cpu 2w-1x4"])
def test_every_rank_reports_the_same(name: str, outcomes: dict[str, Outcome]) -> None:
    first, second = outcomes[name].ranks
    assert first == second


@pytest.mark.parametrize("name", [f"{policy} 2w-1x4" for policy in POLICIES])
def test_cpu_adam_steps_where_the_state_is_offloaded(name: str, outcomes: dict[str, Outcome]) -> None:
    offloaded = "offload_optimizer" in POLICIES[name.split()[0]]
    for answer in outcomes[name].ranks:
        assert (answer["optimizer"]["type"] == "DeepSpeedCPUAdam") == offloaded
        assert answer["optimizer"]["devices"] == ["cpu"]


@pytest.fixture(scope="module")
def expected_without_clipping(tiny: Material) -> reference.Reference:
    _, task = task_of("", tiny, "zero2", "1x8", max_grad_norm=0.0)
    return reference.train(task["job"], tiny.training)


@pytest.mark.parametrize(("policy", "shape"), WITHOUT_CLIPPING)
def test_without_clipping_the_norm_is_still_reported(
    policy: str,
    shape: str,
    outcomes: dict[str, Outcome],
    expected_without_clipping: reference.Reference,
) -> None:
    assert_same_training(outcomes[f"unclipped {policy} {shape}"], expected_without_clipping)


@pytest.fixture(scope="module")
def expected_tied(tiny: Material) -> reference.Reference:
    _, task = task_of("", tiny, "zero2", "1x8", model={"path": str(tiny.tied)})
    return reference.train(task["job"], tiny.training)


@pytest.mark.parametrize(("policy", "shape"), TIED)
def test_an_output_layer_tied_to_the_embedding(
    policy: str, shape: str, outcomes: dict[str, Outcome], expected_tied: reference.Reference
) -> None:
    assert "lm_head.weight" not in expected_tied.parameters
    assert_same_training(outcomes[f"tied {policy} {shape}"], expected_tied)


def test_random_weights_depend_on_the_seed_only(outcomes: dict[str, Outcome]) -> None:
    initial = [outcome.kind("initial") for name, outcome in outcomes.items() if name.startswith("random ")]
    assert len(initial) == 4
    assert initial[0]["model.layers.0.self_attn.q_proj.weight"].std() > 0.01
    for other in initial[1:]:
        assert_close(other, initial[0], 1e-7)


def test_packing_does_not_change_a_step_of_the_same_documents(
    tiny: Material, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each step consists of all documents, once with a pack per document and once packed.

    Both equal the reference, which runs one document at a time.
    """
    home = tmp_path_factory.mktemp("packing")
    material.write_documents(home / "documents", 63, seed=1)
    corpus, packed = planned(
        JobSpec.model_validate_json(json.dumps(job(tiny.model, 1, {}))), home / "documents"
    )
    packs = len(packed)
    assert packs < len(corpus)
    layouts: dict[str, dict[str, Any]] = {
        "alone": {"data": {"packing": "none"}, "global_batch_size": len(corpus), "epochs": 4.0},
        "together": {"data": {"packing": "best_fit"}, "global_batch_size": packs, "epochs": 4.0},
    }
    tasks = [task_of(name, tiny, "zero3", "2w-1x4", **layout) for name, layout in layouts.items()]
    for _, task in tasks:
        task["data"] = str(home / "documents")
    expected = reference.train(tasks[0][1]["job"], home / "documents")
    assert len(expected.losses) == 4
    for outcome in run_all(home, tasks).values():
        assert_same_training(outcome, expected)
        assert sum(outcome.answer["steps"][0]["tokens"]) == corpus.lengths.sum()
