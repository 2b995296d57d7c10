"""ZeRO-3 partitions a model while it is built and while weights are loaded: no rank holds all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.invariant.conftest import Material
from tests.invariant.group import run_group
from tests.invariant.material import POLICIES, job

pytestmark = pytest.mark.distributed


def test_no_rank_holds_or_reads_the_whole_model(tiny: Material, tmp_path: Path) -> None:
    tasks = [
        {
            "name": weights,
            "action": "build_partitioned",
            "job": job(tiny.model, 2, POLICIES["zero3"], model={"weights": weights}),
        }
        for weights in ("pretrained", "random")
    ]
    outcomes = run_group(tmp_path / "group", 2, tasks)
    for outcome in outcomes.values():
        for rank in outcome.ranks:
            assert rank["visible"] == 0, "every parameter is partitioned"
            assert rank["held"] == pytest.approx(rank["whole"] / 2, rel=0.01)
    first, second = outcomes["pretrained"].ranks
    assert first["read_to"] == ["cpu"]
    assert second["read_to"] == ["meta"], "only rank 0 reads values"
    assert outcomes["random"].ranks[0]["read_to"] == []
