"""The texts of all errors and warnings, in one golden file that can be read at once."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.unit.error_texts import COMMAND, GOLDEN, ROOT, collect

_RULES = '''\
from collections.abc import Iterator

from orchestrator.errors import Malformed, SpecError
from orchestrator.words import reason_of, refusal

_RULE = "a positive number"
_HINTS = {"lr": "lower it a little"}
_UNUSED = {"lr": "not an error"}


def check(job, note):
    """Not this; not a text."""
    if job.lr < 0:
        raise SpecError(f"lr={job.lr:g} must be {_RULE}; " + "use 1e-4")
    problem = f"lr={job.lr} is high; {_HINTS['lr']}"
    problems = []
    problems.append("one that is appended")
    note("a note for the user")
    print("an output, and no error")
    if job.rank:
        raise refusal(job, "the second sentence")
    raise SpecError(problem if job.a else "another one", reason_of(job), *problems)


def rules(job) -> Iterator[Problem]:
    yield ("lr",), f"lr: {'; '.join(f'{name} is wrong here' for name in job)}"


class Row:
    def text(self) -> str:
        raise Malformed("no text")
'''
_WORDS = """\
def reason_of(job) -> str:
    return "the reason of " + ("one job" if job.one else "many other jobs") + "!"


def refusal(job, what: str) -> SpecError:
    return SpecError(f"{job.name}: {what}")


def title(job) -> str:
    return "the title of a table"
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return collect(ROOT)


def test_the_golden_file_holds_every_text(lines: list[str]) -> None:
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    difference = difflib.unified_diff(golden, lines, lineterm="", n=0)
    changed = "\n".join(difference)
    assert not changed, f"texts changed; read them, then regenerate with `{COMMAND}`\n{changed}"


def test_known_texts_of_every_kind_are_found(lines: list[str]) -> None:
    """Hold the collector to what the product has, so that it cannot pass by finding nothing."""
    assert len(lines) > 400
    for kind in (
        "does not divide",
        "is not UTF-8 text",
        "nvidia-smi fails",
        "usual values",
        "RAY_AUTH_TOKEN",
    ):
        assert any(kind in line for line in lines), kind


def test_texts_are_found_by_how_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "orchestrator/rules.py").write_text(_RULES, encoding="utf-8")
    (tmp_path / "orchestrator/words.py").write_text(_WORDS, encoding="utf-8")
    assert collect(tmp_path) == [
        "orchestrator/rules.py:check: lr={job.lr} must be a positive number; use 1e-4",
        "orchestrator/rules.py:check: lr={job.lr} is high; {_HINTS['lr']}",
        "orchestrator/rules.py:check: one that is appended",
        "orchestrator/rules.py:check: a note for the user",
        "orchestrator/rules.py:check: the second sentence",
        "orchestrator/rules.py:check: another one",
        "orchestrator/rules.py:rules: lr: {...}",
        "orchestrator/rules.py:rules: {name} is wrong here",
        "orchestrator/rules.py:Row.text: no text",
        "orchestrator/rules.py:_HINTS: lower it a little",
        "orchestrator/words.py:reason_of: the reason of {'one job' if job.one else 'many other jobs'}!",
        "orchestrator/words.py:reason_of: many other jobs",
        "orchestrator/words.py:refusal: {job.name}: {what}",
    ]
