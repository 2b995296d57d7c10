"""Every combination of job settings trains, or is rejected with an error that names a working remedy.

The tests use pairwise covers of all combinations and of the allowed ones: every pair of values of two factors
occurs. `methods.py` trains a random sample of the allowed combinations.
"""

from __future__ import annotations

from itertools import chain

import pytest

from tests.invariant import choices
from tests.invariant.choices import FACTORS, Choice, Pair, every_pair, pairs_of
from tests.invariant.methods import Bench, Verdict, name_of

pytestmark = pytest.mark.distributed

EVERYTHING = choices.cover()
# Regressions that depend on more than two values, so that a pairwise cover may miss them.
THREE = [
    ("dora", "nf4", "adamw", "fp32", "zero3", "on-device", "sp1", "best_fit", "keep-inputs"),
    ("dora", "int8", "adamw", "bf16", "zero2", "on-device", "sp1", "best_fit", "keep-all"),
    ("full", "none", "muon", "bf16", "zero0", "on-device", "sp1", "best_fit", "keep-all"),
    ("embeddings", "nf4", "adamw", "bf16", "zero0", "on-device", "sp2", "best_fit", "keep-all"),
    ("embeddings", "none", "adamw", "fp32", "zero3", "on-device", "sp2", "best_fit", "tiles"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def allowed(bench: Bench) -> list[Choice]:
    return choices.allowed(bench.model)


@pytest.fixture(scope="module")
def verdicts(bench: Bench, allowed: list[Choice]) -> list[Verdict]:
    return list(bench.verdicts(choices.cover(allowed, THREE)))


def with_pair(pair: Pair) -> Choice:
    """Return the combination with two values, and the first value of every other factor."""
    chosen = dict(pair)
    return tuple(chosen.get(factor, next(iter(values))) for factor, values in FACTORS.items())


def never(allowed: list[Choice]) -> set[Pair]:
    """Return the pairs of values that occur in no allowed combination."""
    return every_pair() - set(chain.from_iterable(map(pairs_of, allowed)))


def test_every_two_values_meet() -> None:
    assert set(chain.from_iterable(map(pairs_of, EVERYTHING))) == every_pair()


def test_every_two_values_that_the_rules_allow_train_together(
    allowed: list[Choice], verdicts: list[Verdict]
) -> None:
    trained = [verdict.choice for verdict in verdicts if not verdict.problems]
    assert set(chain.from_iterable(map(pairs_of, trained))) == every_pair() - never(allowed)


def test_what_is_allowed_trains_as_one_plain_process(verdicts: list[Verdict]) -> None:
    wrong = [f"{name_of(each.choice)}: {problem}" for each in verdicts for problem in each.problems]
    assert not wrong, "\n".join(wrong)


def test_what_is_allowed_is_not_refused_and_the_rest_is(bench: Bench, allowed: list[Choice]) -> None:
    accepted = {
        choice for choice in EVERYTHING if not choices.refusals(choices.document_of(choice, bench.model))
    }
    assert accepted == set(EVERYTHING).intersection(allowed)
    assert set() < accepted < set(EVERYTHING)


def test_each_remedy_of_a_refusal_removes_it(bench: Bench) -> None:
    for choice in EVERYTHING:
        document = choices.document_of(choice, bench.model)
        for sentence in choices.refusals(document):
            named = choices.remedies(sentence)
            assert named, f"no remedy in: {sentence}"
            for field, value in named:
                left = choices.refusals(choices.remedied(document, field, value))
                assert sentence not in left, f"{field}: {value} is not a remedy of: {sentence}"


def test_remedies_lead_to_a_job_that_is_accepted(bench: Bench, allowed: list[Choice]) -> None:
    pairs = sorted(never(allowed))
    assert pairs
    jobs = [*EVERYTHING, *map(with_pair, pairs)]
    on_cpu = [("cpu", choice) for choice in jobs if "fp16" in choice]
    for device, choice in [*(("cuda", choice) for choice in jobs), *on_cpu]:
        document = choices.document_of(choice, bench.model)
        changed, accepted = choices.follow(document, device)
        assert bool(changed) == bool(choices.refusals(document, device))
        assert len(changed) <= 5, f"{name_of(choice)} takes {changed}"
        assert not choices.refusals(accepted, device)


def test_a_pair_that_never_trains_is_refused_by_itself(bench: Bench, allowed: list[Choice]) -> None:
    """All other values of these jobs are defaults, so the errors concern the two values."""
    for pair in sorted(never(allowed)):
        sentences = choices.refusals(choices.document_of(with_pair(pair), bench.model))
        assert sentences, f"{pair} trains nowhere and is not refused"
