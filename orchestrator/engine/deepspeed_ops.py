"""Compile and load DeepSpeed's C++ operators.

`python -m orchestrator.engine.deepspeed_ops [nvme]` compiles them ahead of the first run; later runs load
them from PyTorch's extension cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Protocol

from orchestrator.errors import ClusterError
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig

_PYTORCH_LOCK = "lock"  # name of PyTorch's lock file, in the build directory of an operator


def isolate_extension_cache() -> None:
    """Use the ninja and an extension cache of this virtual environment.

    Ninja recompiles an operator, which takes a minute, if its command line changed. The command line has
    include paths of the environment, and ninja versions hash it differently, so that environments that
    share a cache would invalidate each other's operators at every start.
    """
    bin_dir = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != bin_dir:
        os.environ["PATH"] = f"{bin_dir}{os.pathsep}{path}"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def build_ops(nvme: bool = False) -> list[tuple[str, float]]:
    """Compile or load the operators in use: CPU Adam, and shared-memory collectives on CPU.

    Args:
        nvme: Also build the asynchronous I/O operator for NVMe offload, which takes minutes.

    Returns:
        Name and build seconds of each operator.

    Raises:
        ClusterError: There is no C++ compiler, or no libaio.
    """
    isolate_extension_cache()
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise ClusterError(
            "no C++ compiler found, and DeepSpeed compiles its operators at first use; install g++"
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
        load_op(builder)
        timings.append((builder.name, time.perf_counter() - started))
    return timings


class OpBuilder(Protocol):
    """A builder of deepspeed.ops.op_builder."""

    name: str

    def load(self, verbose: bool = True) -> object:
        """Compile the operator if needed, and import it."""


def load_op(builder: OpBuilder) -> None:
    """Load an operator; one process of this machine compiles it while the others wait.

    PyTorch's own lock is a file whose mere existence makes it wait, even if the process that wrote it is
    dead. Under our flock, which the kernel releases with its process, any such file is a leftover.

    Args:
        builder: DeepSpeed's builder of the operator.
    """
    from torch.utils.cpp_extension import _get_build_directory

    build_dir = Path(_get_build_directory(builder.name, verbose=False))
    with (build_dir.parent / f".{builder.name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (build_dir / _PYTORCH_LOCK).unlink(missing_ok=True)
        builder.load(verbose=False)


def load_ops(ds_config: DeepSpeedConfig) -> None:
    """Load the operators that a DeepSpeed configuration needs.

    Args:
        ds_config: As `orchestrator.parallel.deepspeed_config.render` returns it.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    zero = ds_config["zero_optimization"]
    optimizer_device, param_device = (
        zero.get(section, {}).get("device") for section in ("offload_optimizer", "offload_param")
    )
    if optimizer_device in ("cpu", "nvme"):
        load_op(CPUAdamBuilder())
    if "nvme" in (optimizer_device, param_device):
        load_op(AsyncIOBuilder())


def load_shared_memory_collectives() -> None:
    """Load the operator for collectives over shared memory, if this is a CPU that supports it."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None and builder.is_compatible():
            load_op(builder)


def require_async_io() -> None:
    """Raise if this machine lacks libaio, which NVMe offload requires.

    Raises:
        ClusterError: libaio is not installed.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ClusterError(
            f"{os.uname().nodename} has no libaio, which parallel.offload_optimizer=nvme and "
            "offload_param=nvme require; install libaio-dev (libaio-devel) and g++ on every node, or offload "
            "to cpu"
        )


if __name__ == "__main__":
    for name, seconds in build_ops(nvme="nvme" in sys.argv[1:]):
        sys.stdout.write(f"{name} ready after {seconds:.1f} s\n")
