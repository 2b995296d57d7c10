"""Limit the memory of a worker, and recognise out-of-memory errors."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

# Messages of torch's CPU allocator, the C++ library and DeepSpeed's operators when mmap fails.
_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory")


@contextmanager
def limit_memory(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Limit the memory that this process can allocate, so that a larger one fails as on a full device.

    On CUDA the limit holds for PyTorch's caching allocator. On CPU it holds for the data segment
    (RLIMIT_DATA), on top of its current size. The limit is removed before an exception leaves the block,
    so that there is memory to report it.

    Args:
        device: Device of the model.
        limit_bytes: The limit; None means no limit.
    """
    if limit_bytes is None:
        yield
    elif device.type == "cuda":
        fraction = limit_bytes / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        # Arrow reserves 1 GiB of addresses at its first allocation; they must not count against the limit.
        pa.array([0])
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + limit_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory of the device or the host ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        message in str(error) for message in _OUT_OF_MEMORY_MESSAGES
    )


def _data_bytes() -> int:
    """Return what the kernel counts against RLIMIT_DATA: private writable mappings."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in status if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024
