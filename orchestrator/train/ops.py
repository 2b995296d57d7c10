"""Compiling DeepSpeed's C++ operators once, visibly, instead of silently inside the first run.

Run as `python -m orchestrator.train.ops`; later calls find them in PyTorch's extension cache and take seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from orchestrator.errors import ClusterError


def build() -> list[tuple[str, float]]:
    """Compile or load the operators that the policies use: CPU Adam, and on CPU the shared-memory collectives.

    Returns:
        Name and seconds of each.

    Raises:
        ClusterError: There is no C++ compiler.
    """
    # ninja stands beside the interpreter, which need not be on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
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
