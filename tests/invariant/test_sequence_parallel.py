"""Sharing a row among workers changes nothing: losses, gradients and their norm are those of one plain
process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.invariant import material, reference
from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import job

pytestmark = pytest.mark.distributed

# ZeRO stage, sequence_parallel_size, data-parallel workers, packing, KV heads, accumulation steps,
# truncation. A pairwise cover of stage x degrees x packing x KV heads x accumulation.
CELLS: list[tuple[int, int, int, str, int, int]] = [
    (2, 2, 1, "best_fit", 2, 1),
    (3, 2, 1, "none", 4, 3),
    (2, 4, 1, "best_fit", 1, 3),
    (3, 4, 1, "best_fit", 2, 1),
    (2, 2, 2, "none", 1, 1),
    (3, 2, 2, "best_fit", 8, 1),
    (3, 4, 1, "none", 8, 3),
    (2, 4, 1, "none", 4, 1),
    (3, 2, 1, "concat", 1, 1),
]


def name_of(cell: tuple[int, int, int, str, int, int]) -> str:
    return "zero{}-sp{}-dp{}-{}-kv{}-acc{}".format(*cell)


def task_of(
    tiny: Material, home: Any, cell: tuple[int, int, int, str, int, int]
) -> tuple[int, dict[str, Any]]:
    stage, size, data_parallel, packing, kv_heads, accumulation = cell
    workers = size * data_parallel
    document = job(
        home / f"kv{kv_heads}",
        workers,
        {"zero_stage": stage, "sequence_parallel_size": size},
        data={"packing": packing},
        eval={"every_steps": 2},
        global_batch_size=data_parallel * accumulation,
        max_steps=4,
    )
    return workers, {
        "name": name_of(cell),
        "action": "train",
        "job": document,
        "data": str(tiny.training),
        "held_out": str(tiny.held_out),
        "parameters": True,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sequence")
    for kv_heads in sorted({cell[4] for cell in CELLS}):
        material.write_model(folder / f"kv{kv_heads}", num_key_value_heads=kv_heads)
    return folder


@pytest.fixture(scope="module")
def outcomes(tiny: Material, home: Any) -> dict[str, Outcome]:
    tasks = [task_of(tiny, home, cell) for cell in CELLS]
    found: dict[str, Outcome] = {}
    for workers in sorted({workers for workers, _ in tasks}):
        mine = [task for at, task in tasks if at == workers]
        found |= run_group(home / f"{workers}-workers", workers, mine)
    return found


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_sharing_a_row_does_not_change_training(
    cell: tuple[int, int, int, str, int, int], tiny: Material, home: Any, outcomes: dict[str, Outcome]
) -> None:
    _, task = task_of(tiny, home, cell)
    expected = reference.train(task["job"], tiny.training, tiny.held_out)
    outcome = outcomes[name_of(cell)]
    steps = outcome.answer["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(expected.gradient_norms, rel=1e-4)
    assert_close(outcome.kind("gradient"), expected.gradients, 1e-4)
    assert_close(outcome.kind("parameter"), expected.parameters, 1e-4)
    for answer in outcome.ranks:
        assert answer["evaluations"][-1][1] == pytest.approx(expected.evaluation, rel=1e-5)


def test_some_shares_hold_no_label(outcomes: dict[str, Outcome]) -> None:
    trained = [step["trained_tokens"] for outcome in outcomes.values() for step in outcome.answer["steps"]]
    assert any(0 in ranks for ranks in trained)
    assert all(sum(ranks) for ranks in trained)
