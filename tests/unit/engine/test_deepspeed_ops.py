"""Operators are compiled by one process at a time, whatever became of those before."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from orchestrator.engine import deepspeed_ops


class Builder:
    """Stands for one of DeepSpeed's; would wait for ever for a mark that nobody removes."""

    name = "some_op"

    def __init__(self, mark: Path) -> None:
        self._mark = mark
        self.loaded = 0

    def load(self, verbose: bool) -> None:
        assert not verbose
        assert not self._mark.exists()
        self.loaded += 1


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Builder(tmp_path / "some_op" / "lock")


def test_what_a_killed_compilation_left_is_not_waited_for(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "some_op").mkdir()
    (tmp_path / "some_op" / "lock").write_text("")
    deepspeed_ops.load(builder)
    assert builder.loaded == 1


def test_a_compilation_under_way_is_waited_for(builder: Builder, tmp_path: Path) -> None:
    with (tmp_path / ".some_op.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        waiting = threading.Thread(target=deepspeed_ops.load, args=(builder,))
        waiting.start()
        waiting.join(0.3)
        assert builder.loaded == 0
    waiting.join(10)
    assert builder.loaded == 1


def test_only_what_is_offloaded_needs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(deepspeed_ops, "load", lambda builder: loaded.append(builder.name))
    deepspeed_ops.load_for({"zero_optimization": {"stage": 2}})
    assert loaded == []
    deepspeed_ops.load_for({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert loaded == ["cpu_adam"]
    nvme = {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}
    deepspeed_ops.load_for({"zero_optimization": nvme})
    assert loaded[1:] == ["cpu_adam", "async_io"]
