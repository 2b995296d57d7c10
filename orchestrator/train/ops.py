"""Compiling DeepSpeed's C++ operators once, visibly, instead of silently inside the first run.

Run as `python -m orchestrator.train.ops [nvme]`; later calls find them in PyTorch's extension cache.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from orchestrator.errors import ClusterError


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
        builder.load(verbose=False)
        timings.append((builder.name, time.perf_counter() - started))
    return timings


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
