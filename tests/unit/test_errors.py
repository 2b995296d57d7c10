"""Errors keep their problems across processes and print them all."""

import pickle

import pytest

from orchestrator.errors import ClusterError, OrchestratorError, SpecError, TrainingError

KINDS = [(OrchestratorError, 1), (SpecError, 2), (ClusterError, 3), (TrainingError, 4)]


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_each_kind_has_its_exit_code(kind: type[OrchestratorError], code: int) -> None:
    assert kind.exit_code == code
    assert kind("x").exit_code == code
    assert issubclass(kind, OrchestratorError)


def test_titles_differ() -> None:
    assert len({kind.title for kind, _ in KINDS}) == len(KINDS)


@pytest.mark.parametrize(("kind", "_code"), KINDS)
@pytest.mark.parametrize("problems", [(), ("one",), ("one", "two ünïcode\nlines")])
def test_errors_survive_pickling(
    kind: type[OrchestratorError], _code: int, problems: tuple[str, ...]
) -> None:
    error = kind(*problems)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is kind
        assert copy.problems == problems
        assert str(copy) == str(error)


def test_one_problem_is_one_line() -> None:
    assert str(SpecError("optim.lr=0 is out of range")) == "job file error: optim.lr=0 is out of range"


def test_several_problems_are_a_list_that_begins_with_their_number() -> None:
    assert str(ClusterError("first", "second")) == "cluster error: 2 problems\n  - first\n  - second"
