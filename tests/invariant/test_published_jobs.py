"""Each job of XTuner's table trains with a tiny model; sequence parallelism does not change its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import loader
from tests.invariant import material
from tests.invariant.conftest import Material
from tests.invariant.group import Outcome, run_group
from tests.unit.config.test_published_jobs import FOLDER, ROWS

pytestmark = pytest.mark.distributed

PROFILES = {"published": [], "documents": ["data.cross_document_attention=false", "data.packing=best_fit"]}
CASES = [(name, "published") for name in ROWS] + [
    (n, "documents") for n in ("llama2-70b-1m", "yi-34b-200k-32k")
]


def toy(name: str, profile: str, model: Path, workers: int) -> dict[str, Any]:
    """Return a published job with a tiny model, short packs and few workers."""
    changes = [
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.max_length={material.MAX_LENGTH}",
        f"parallel.workers={workers}",
        f"parallel.sequence_parallel_size={workers}",
        "optim.global_batch_size=4",
        "optim.max_steps=2",
        "parallel.device=cpu",
        "run.seed=11",
    ]
    found: dict[str, Any] = loader.load(FOLDER / f"{name}.yaml", [*changes, *PROFILES[profile]]).model_dump(
        mode="json"
    )
    found["data"]["train"] = [{"path": "unused"}]
    return found


@pytest.fixture(scope="module")
def outcomes(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Outcome]]:
    """Train every case with sequence parallelism over up to four workers, and with one worker."""
    home = tmp_path_factory.mktemp("published")
    tasks: dict[int, list[dict[str, Any]]] = {}
    for name, profile in CASES:
        for workers in {1, min(4, ROWS[name][2])}:
            job = toy(name, profile, tiny.model, workers)
            tasks.setdefault(workers, []).append(
                {"name": f"{name} {profile}", "action": "train", "job": job, "data": str(tiny.training)}
            )
    return {workers: run_group(home / str(workers), workers, mine) for workers, mine in tasks.items()}


@pytest.mark.parametrize(("name", "profile"), CASES)
def test_a_published_job_trains_at_toy_scale(
    name: str, profile: str, outcomes: dict[int, dict[str, Outcome]]
) -> None:
    case = f"{name} {profile}"
    losses = [step["loss"] for step in outcomes[1][case].answer["steps"]]
    assert len(losses) == 2
    assert losses[1] != losses[0]
    shared = outcomes[min(4, ROWS[name][2])][case].answer["steps"]
    assert [step["loss"] for step in shared] == pytest.approx(losses, rel=1e-5)
