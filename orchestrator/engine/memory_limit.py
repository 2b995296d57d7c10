"""How much memory a worker may take, and how to tell that it was not enough."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

# What torch's CPU allocator, the C++ library and DeepSpeed's operators say when the kernel grants no more.
_SIGNS = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory")


@contextmanager
def limited_memory(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Let a worker take no more memory than this for what runs inside.

    On CUDA the allocator of this process refuses to hold more. On CPU the kernel refuses the process more
    data than it holds now plus the limit. Taking memory then fails as on a device that is full, and the
    limit is lifted before anybody is told.

    Args:
        device: Where the model is.
        limit_bytes: The limit; None sets none.
    """
    if limit_bytes is None:
        yield
    elif device.type == "cuda":
        share = limit_bytes / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        pa.array(
            [0]
        )  # at its first allocation Arrow reserves a GiB of addresses, which training does not use
        before, hardest = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + limit_bytes, hardest))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (before, hardest))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, of the device or of the host, did not do."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in _SIGNS)


def _data_bytes() -> int:
    """Return what the kernel counts against RLIMIT_DATA: private writable memory that is mapped."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in status if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024
