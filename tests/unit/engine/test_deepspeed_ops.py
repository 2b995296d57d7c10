"""Operators are compiled by one process at a time, also after a compilation was killed."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from orchestrator.engine import deepspeed_ops


class Builder:
    """A stand-in for DeepSpeed's builder, which would wait forever if a stale lock file existed."""

    name = "some_op"

    def __init__(self, lock_file: Path) -> None:
        self._lock_file = lock_file
        self.loaded = 0

    def load(self, verbose: bool) -> None:
        assert not verbose
        assert not self._lock_file.exists()
        self.loaded += 1


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Builder(tmp_path / "some_op" / "lock")


def test_a_stale_lock_file_is_removed(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "some_op").mkdir()
    (tmp_path / "some_op" / "lock").write_text("")
    deepspeed_ops.load_op(builder)
    assert builder.loaded == 1


def test_a_running_compilation_is_waited_for(builder: Builder, tmp_path: Path) -> None:
    with (tmp_path / ".some_op.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        waiting = threading.Thread(target=deepspeed_ops.load_op, args=(builder,))
        waiting.start()
        waiting.join(0.3)
        assert builder.loaded == 0
    waiting.join(10)
    assert builder.loaded == 1


def test_only_operators_that_the_configuration_needs_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(deepspeed_ops, "load_op", lambda builder: loaded.append(builder.name))
    deepspeed_ops.load_ops({"zero_optimization": {"stage": 2}})
    assert loaded == []
    deepspeed_ops.load_ops({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert loaded == ["cpu_adam"]
    nvme = {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}
    deepspeed_ops.load_ops({"zero_optimization": nvme})
    assert loaded[1:] == ["cpu_adam", "async_io"]
