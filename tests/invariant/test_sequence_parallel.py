"""Sequence parallelism gives the losses, gradients and gradient norms of a single process.

The cells are a pairwise cover: every pair of values of two axes occurs. `matrix.py` runs all combinations.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest
from allpairspy import AllPairs

from tests.invariant.matrix import AXES, EXTRA, Bench, Cell, Verdict

pytestmark = pytest.mark.distributed

COVER = [Cell(*values) for values in AllPairs([list(values) for values in AXES.values()])]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Verdict]:
    bench = Bench(tmp_path_factory.mktemp("matrix"))
    return {verdict.cell: verdict for verdict in bench.verdicts([*COVER, *EXTRA])}


def test_every_two_values_meet() -> None:
    for (one, values), (other, others) in combinations(AXES.items(), 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in COVER}
        assert met == set(product(values, others)), f"{one} and {other}"


@pytest.mark.parametrize("cell", [*COVER, *EXTRA], ids=str)
def test_sharing_a_row_does_not_change_training(cell: Cell, verdicts: dict[Cell, Verdict]) -> None:
    assert not verdicts[cell].problems, "\n".join(verdicts[cell].problems)
