"""Compiling DeepSpeed's C++ operators once, visibly, instead of silently inside the first run.

Run as `python -m orchestrator.train.ops`; later calls find them in PyTorch's extension cache.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from orchestrator.errors import ClusterError


def use_own_ninja() -> None:
    """Put the ninja that stands beside the interpreter first on the path.

    Two versions of ninja hash the same command differently, so that each would compile again, for a minute,
    what the other has compiled.
    """
    beside = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"


def build() -> list[tuple[str, float]]:
    """Compile or load the operators that policies use: CPU Adam, and on CPU shared-memory collectives.

    Returns:
        Name and seconds of each.

    Raises:
        ClusterError: There is no C++ compiler.
    """
    use_own_ninja()
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise ClusterError(
            "no C++ compiler is found, and DeepSpeed compiles its operators at first use; install g++"
        )
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builders = [CPUAdamBuilder()]
    if get_accelerator().device_name() == "cpu":
        builders.append(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    timings = []
    for builder in builders:
        started = time.perf_counter()
        builder.load(verbose=False)
        timings.append((builder.name, time.perf_counter() - started))
    return timings


if __name__ == "__main__":
    for name, seconds in build():
        sys.stdout.write(f"{name} ready after {seconds:.1f} s\n")
