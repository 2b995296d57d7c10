"""Randomly mutated job files: each one loads or raises SpecError, and no other exception."""

import random

import pytest

from orchestrator.config.loader import dump, parse
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from tests.unit.config.jobs import WHOLE

_ODD_SCALARS = [
    ".nan", "-.inf", "-0", "1e400", "-1e-400", "1" + "0" * 60, "9" * 4999, "0x" + "f" * 600, "0o8", "08",
    "1:2:3", "1_0", "é", "\U0001f600", "\u2028", "\ufeff", "\x07", '"\\ud800"', '"\\0"', '"\\x00a"', "\t",
    "", "~", "null", "true", "yes", "[]", "{}", "[1, [2, {a: 3}]]", "{path: {path: x}}", "[[[[[[]]]]]]",
    "&a x", "*a", "&a [*a]", "<<", "{<<: {a: 1}}", "!!python/object:os.system {}",
    "!!python/name:os.system", "!!binary aGVsbG8=", "!!binary '*'", "!!bool maybe", "!!int ''", "!!float x",
    "!!timestamp x", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!unknown x",
    "!!str {a: 1}", "!!map [1]", "2020-01-01", "2020-13-01T00:00:00Z", "|", ">-", "'", '"', "#", "%", "@",
    "`", ": :", "? [1]\n: 2", "- x", "---", "...", "3.0", "1.5e", "NaN", "Infinity", "\x00", "x" * 5000,
]  # fmt: skip


def mutated(text: str, chance: random.Random) -> str:
    """Return the text with one to four random mutations of its lines."""
    lines = text.split("\n")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines))
        kind = chance.randrange(7)
        head, colon, _ = lines[at].partition(":")
        if kind == 0:
            lines[at : at + 1] = [] if len(lines) > 1 else [""]
        elif kind == 1:
            lines.insert(chance.randrange(len(lines)), lines[at])
        elif kind == 2:
            lines[at] = chance.choice(lines)
        elif kind == 3:
            lines[at] = chance.choice(["  ", "\t", " ", "- ", "? "]) + lines[at]
        elif kind == 4:
            cut = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + chance.choice(_ODD_SCALARS) + lines[at][cut:]
        else:
            lines[at] = head + colon + " " + chance.choice(_ODD_SCALARS)
    return "\n".join(lines)


def outcome(text: str) -> JobSpec | BaseException:
    try:
        return parse(text)
    except BaseException as error:
        return error


@pytest.mark.timeout(300)  # for all files; a text with exponential expansion would never finish
def test_mutated_job_files() -> None:
    chance = random.Random(20260701)
    valid = 0
    for number in range(2000):
        text = mutated(WHOLE, chance)
        found = outcome(text)
        if isinstance(found, JobSpec):
            assert parse(dump(found)) == found, (number, text)
            valid += 1
        else:
            assert isinstance(found, SpecError), (number, found, text)
            assert found.problems, (number, text)
            assert all(len(problem) < 2000 for problem in found.problems), (number, text)
    assert 100 < valid < 1000  # both outcomes occur often
