"""Host memory that a GPU reads and writes at full speed."""

import mmap
import weakref
from collections.abc import Sequence
from math import prod

import torch


def host_tensor(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Allocates zeros on the CPU; pinned where `device` is a GPU, and exactly as long as asked for (torch's own pinned
    allocator rounds up to a power of two). RuntimeError where the system refuses to pin so much."""
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # pages appear, zero, when they are touched
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    out = torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
    if device == "cuda":
        _pin(out, size)
    return out


def _pin(tensor: torch.Tensor, size: int) -> None:
    """In one call: a copy that spans two pinned ranges is refused by the driver. About 4 GiB a second."""
    runtime, address = torch.cuda.cudart(), tensor.data_ptr()
    if code := int(runtime.cudaHostRegister(address, size, 0)):
        raise RuntimeError(f"not enough memory: {size} bytes of host memory could not be pinned (CUDA error {code})")
    weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, address)
