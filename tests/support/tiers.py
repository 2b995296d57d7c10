"""Tiers of tests, and how pytest-xdist shares them out.

A test that starts a process has the marker `process`; `ray`, `distributed`, `cluster` and `gpu` imply it. All
others are the fast tier, and a guard fails one of them that starts a process. The tests of a file run in one
worker, in their order; the files that take longest come first, so that none of them is left for the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import load

IMPLY_PROCESS = frozenset({"ray", "distributed", "cluster", "gpu"})
END_TO_END = frozenset({"bench", "chaos", "cluster", "gpu"})
"""Folders whose tests start commands; they have the marker without saying so."""
ASKED = frozenset({"gcc", "git", "ip", "ldconfig", "lscpu", "nvidia-smi", "objdump", "uname"})
"""Programs that are asked about machine and checkout, by us and by libraries; they end at once."""

GROUPS = dict.fromkeys(
    ("exports/test_files.py", "exports/test_loads.py", "exports/test_transformers_4.py"), "exports"
)
"""Files that share a worker with another, by their path below tests/: group."""

APART = frozenset({"chaos/test_bad_input.py"})
"""Long files whose tests share nothing, and run in any worker."""

LONGEST_FIRST = (
    "chaos/test_sigterm.py",
    "chaos/test_data_faults.py",
    "chaos/test_planted_files.py",
    "invariant/test_equivalence.py",
    "chaos/test_kill.py",
    "cluster/test_monitoring.py",
    "chaos/test_finished.py",
    "invariant/test_methods.py",
    "cluster/test_resubmit.py",
    "chaos/test_shared_head.py",
    "cluster/test_testbed.py",
    "bench/test_sweep.py",
    "invariant/test_adapters.py",
    "chaos/test_changing_files.py",
    "cluster/test_newcomer.py",
    "invariant/test_checkpoint.py",
    "cluster/test_two_nodes.py",
    "cluster/test_token.py",
    "cluster/test_doctor.py",
    "chaos/test_bad_input.py",
    "invariant/test_architectures.py",
    "chaos/test_failing_code.py",
    "chaos/test_rows_without_answers.py",
    "chaos/test_bad_models.py",
    "invariant/test_quantized.py",
    "invariant/test_optimizers.py",
    "invariant/test_resized.py",
    "unit/test_shutdown.py",
)
"""Files whose tests begin first, in this order; the others follow in the order of collection."""

_TESTS = Path(__file__).resolve().parents[1]


class Guard:
    """Notes the processes that are started while a test of the fast tier runs."""

    def __init__(self) -> None:
        self.is_on = False
        self.started: list[str] = []
        sys.addaudithook(self._audit)  # cannot be removed, so that it does nothing while it is off

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "subprocess.Popen":
            program = os.fsdecode(arguments[0])
            if Path(program).name not in ASKED:
                self.started.append(f"{program} {arguments[1]!r:.200}")
        elif event in {"os.fork", "os.forkpty", "os.posix_spawn", "os.system"}:
            self.started.append(f"{event}{arguments!r:.200}")


_guard = Guard()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that others imply, and put the groups of tests into their order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    for item in items:
        path = item.path.relative_to(_TESTS)
        if path.parts[0] in END_TO_END or any(mark.name in IMPLY_PROCESS for mark in item.iter_markers()):
            item.add_marker("process")
    items.sort(key=lambda item: ranks.get(_file(item.nodeid), len(ranks)))


def group_of(nodeid: str) -> str:
    """Return the group of a test: its file, unless that shares a worker with others or with none."""
    name = _file(nodeid)
    return nodeid if name in APART else GROUPS.get(name, name)


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0].removeprefix("tests/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out groups in their order. The marker `xdist_group` of xdist 3.8 has no effect in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def _reschedule(self, node: Any) -> None:
            # One group ahead is what a worker needs; two, and the last ones would wait for each other.
            if not self.workqueue or self._pending_of(self.assigned_work[node]) <= 1:
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch what a test of the fast tier starts, the set-up of its fixtures included."""
    _guard.started.clear()
    _guard.is_on = item.get_closest_marker("process") is None
    try:
        with load.timed(item.get_closest_marker("timed") is not None):
            return (yield)
    finally:
        _guard.is_on = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of the fast tier that has started a process."""
    result = yield
    if _guard.started:
        begun = "; ".join(_guard.started)
        pytest.fail(f"a test without the marker `process` has started: {begun}", pytrace=False)
    return result
