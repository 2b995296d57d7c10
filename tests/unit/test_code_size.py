"""The script that measures the product's code, on a tree that is small enough to count by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.code_size import measure, measure_revision, table

_DRIVER = '''\
"""A driver."""

from typing import Any

from launch import report
from orchestrator.data.store import Store
from orchestrator.errors import RunError
from orchestrator.train import folder


def run(job: Any, *, force: bool = False) -> Any:
    folder.open(job)
    folder.lock(job)
    return _fit(job)


def _fit(job: Any) -> Any:
    # A reason.
    store = Store.load(job)  # noqa: F841
    if not store:
        raise RunError("x")
    print(len(job))
    folder.close(job)
    return report(job)
'''
_FOLDER = """\
import logging

from . import lease
from ..errors import RunError

_logger = logging.getLogger(__name__)


def open(job):
    _logger.info("open")
    logging.warning("twice")
    _logger.setLevel(10)
"""
_FILES = {
    "orchestrator/__init__.py": "",
    "orchestrator/errors.py": "class RunError(Exception):\n    pass\n",
    "orchestrator/data/__init__.py": "",
    "orchestrator/data/store.py": "class Store:\n    pass\n",
    "orchestrator/train/__init__.py": "",
    "orchestrator/train/driver.py": _DRIVER,
    "orchestrator/train/folder.py": _FOLDER,
    "orchestrator/train/lease.py": "import os\n",
    "launch/__init__.py": "def report(job):\n    return job\n",
    "tests/test_nothing.py": "def test_nothing():\n    pass\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_lines_functions_and_rates(tree: Path) -> None:
    figures = measure(tree)
    lines = sum(text.count("\n") for name, text in _FILES.items() if not name.startswith("tests"))
    assert (figures["files"], figures["lines"], figures["functions"]) == (9, lines, 4)
    assert figures["function_lines_median"] == 4  # of 2, 4, 4 and 8
    assert (figures["function_lines_p90"], figures["function_lines_max"]) == (8, 8)
    assert figures["any_per_1000_lines"] == round(4000 / lines, 2)
    assert figures["comments_per_100_lines"] == round(100 / lines, 2)
    assert figures["logger_calls_per_1000_lines"] == round(2000 / lines, 2)


def test_imports_between_rooms_are_pairs_of_modules(tree: Path) -> None:
    figures = measure(tree)
    assert figures["rooms"] == {
        "orchestrator.train -> launch": 1,
        "orchestrator.train -> orchestrator": 2,
        "orchestrator.train -> orchestrator.data": 1,
    }
    assert (figures["imports_between_rooms"], figures["pairs_of_rooms"]) == (4, 3)


def test_the_path_through_the_driver(tree: Path) -> None:
    figures = measure(tree)
    assert figures["driver_calls_by_module"] == {
        "orchestrator.train.folder": 3,
        "orchestrator.data.store": 1,
        "orchestrator.errors": 1,
        "launch": 1,
    }
    assert (figures["driver_calls"], figures["driver_modules"]) == (6, 4)
    assert figures["driver_crossings"] == 5  # folder, store, errors, folder, launch
    assert (figures["driver_functions"], figures["driver_parameters"]) == (2, 3)
    assert figures["driver_parameters_max"] == 2


@pytest.mark.process
def test_a_revision_is_read_from_git_and_not_from_the_checkout(tree: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], cwd=tree, check=True)
    before = measure(tree)
    (tree / "orchestrator/train/driver.py").unlink()
    assert measure_revision("HEAD", tree) == before
    shown = table({"HEAD": before, "now": measure(tree)}).splitlines()
    assert next(line for line in shown if line.startswith("driver_calls ")).split() == [
        "driver_calls",
        "6",
        "-",
    ]
