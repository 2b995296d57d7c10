"""Compiling DeepSpeed's C++ operators once, visibly, instead of silently inside the first run.

Run as `python -m orchestrator.engine.deepspeed_ops [nvme]`; later calls find them in the extension cache of
PyTorch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError

_MARK = "lock"  # PyTorch's, in an operator's folder


def keep_to_own_environment() -> None:
    """Compile with the ninja of this environment, into a cache of this environment.

    Operators are compiled again, for a minute, whenever their command differs from the last one: in the
    path of an environment's headers, or in how another version of ninja hashes it. Environments that share
    a cache would do that to each other at every start.
    """
    beside = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def build(nvme: bool = False) -> list[tuple[str, float]]:
    """Compile or load the operators that policies use: CPU Adam, and on CPU shared-memory collectives.

    Args:
        nvme: Also those that offload to a disk, which takes minutes more.

    Returns:
        Name and seconds of each.

    Raises:
        ClusterError: There is no C++ compiler, or no libaio.
    """
    keep_to_own_environment()
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise ClusterError(
            "no C++ compiler is found, and DeepSpeed compiles its operators at first use; install g++"
        )
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    builders = [CPUAdamBuilder()]
    if nvme:
        require_async_io()
        builders.append(AsyncIOBuilder())
    if get_accelerator().device_name() == "cpu":
        builders.append(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    timings = []
    for builder in builders:
        started = time.perf_counter()
        load(builder)
        timings.append((builder.name, time.perf_counter() - started))
    return timings


def load(builder: Any) -> None:
    """Load one of DeepSpeed's operators, compiled by one process of this machine while the others wait.

    PyTorch marks a compilation under way by a file that it waits for, also when whoever wrote it is dead.
    Here a lock that ends with its process guards it, so what is found under the lock was left behind.

    Args:
        builder: Of the operator.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder.parent / f".{builder.name}.lock").open("w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / _MARK).unlink(missing_ok=True)
        builder.load(verbose=False)


def load_for(ds_config: Mapping[str, Any]) -> None:
    """Load the operators that a DeepSpeed configuration needs.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    zero = ds_config["zero_optimization"]
    places = [zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")]
    if places[0] in ("cpu", "nvme"):
        load(CPUAdamBuilder())
    if "nvme" in places:
        load(AsyncIOBuilder())


def load_collectives() -> None:
    """Load the operator with which DeepSpeed reduces among processes of one machine, where there is one."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None and builder.is_compatible():
            load(builder)


def require_async_io() -> None:
    """Refuse to offload to a disk from a machine without the library that DeepSpeed does it with.

    Raises:
        ClusterError: It is not installed.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ClusterError(
            f"{os.uname().nodename} has no libaio, with which parallel.offload_optimizer=nvme and "
            "offload_param=nvme read and write; install libaio-dev (libaio-devel) and g++ on every node, or "
            "offload to cpu"
        )


if __name__ == "__main__":
    for name, seconds in build(nvme="nvme" in sys.argv[1:]):
        sys.stdout.write(f"{name} ready after {seconds:.1f} s\n")
