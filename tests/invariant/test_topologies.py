"""A checkpoint is of the model: any topology loads what any other one saved, to the bit."""

from __future__ import annotations

import pytest

from tests.invariant import topologies
from tests.invariant.group import Outcome
from tests.invariant.topologies import Bench, Topology, Verdict

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    bench = Bench(tmp_path_factory.mktemp("topologies"))
    return list(bench.verdicts(topologies.cover()))


def test_state_is_handed_over_to_the_bit_and_losses_continue(verdicts: list[Verdict]) -> None:
    wrong = [f"{each.transfer}: {problem}" for each in verdicts for problem in each.problems]
    assert not wrong, "\n".join(wrong)


def test_the_cover_has_every_value_on_both_sides(verdicts: list[Verdict]) -> None:
    assert {each.transfer.kind for each in verdicts} == set(topologies.ANY)
    for side in ("saved", "loaded"):
        for name, values in topologies.AXES.items():
            assert {getattr(getattr(each.transfer, side), name) for each in verdicts} == set(values)


REFUSED = {
    "another optimizer": (
        "full",
        "muon",
        2,
        "state of optim.optimizer=adamw, and this run uses muon",
    ),
    "another method": ("full", "lora", 2, "weights, this run trains"),
    "another model": ("tied", "full", 2, "lm_head.weight is missing there and [160, 64] here"),
    "8-bit in other partitions": (
        "8-bit",
        "8-bit",
        3,
        "blocks of the partitions of zero_stage=2, workers=2",
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    bench = Bench(tmp_path_factory.mktemp("refusals"))
    two, three = (Topology(workers, 2, 1, "none") for workers in (2, 3))
    saved = {(saved, two) for saved, *_ in REFUSED.values()}
    bench.save(saved)
    tasks = [
        (workers, bench.refuse(name, (kind, two), (other, two if workers == 2 else three)))
        for name, (kind, other, workers, _) in REFUSED.items()
    ]
    tasks.append((2, bench.refuse("8-bit in the same partitions", ("8-bit", two), ("8-bit", two))))
    return bench.run("refused", tasks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_by_name(name: str, refusals: dict[str, Outcome]) -> None:
    (problems,) = refusals[name].answer["problems"].values()
    assert REFUSED[name][-1] in problems[0]
    assert "or export the checkpoint and start a new run from the exported model" in problems[0]


def test_8_bit_state_is_loaded_into_the_same_partitions(refusals: dict[str, Outcome]) -> None:
    assert list(refusals["8-bit in the same partitions"].answer["problems"].values()) == [None]
