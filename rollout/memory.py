"""Tensors whose memory can be given back and regained at the same addresses, so that CUDA graphs over them stay valid."""

import mmap
from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch

_ALIGNMENT = 256  # bytes, as of cudaMalloc


class Arena(Protocol):
    """Holds a range of addresses, uint8 [at least the size asked for], and the physical memory under it."""

    bytes: torch.Tensor

    def release(self) -> None:
        """Gives the physical memory back; the addresses stay reserved."""

    def regain(self) -> None:
        """Lays physical memory, of any content, under the same addresses."""


class _HostArena:
    """On a CPU: private pages, which the system takes back when told that nobody needs them, and gives anew when touched."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def regain(self) -> None:
        pass


class Reclaimable:
    """Holds named tensors on `device`, the current one where that is "cuda". NaN when fresh, so that what was not
    written cannot be read unnoticed. `release` takes the physical memory from under them, `regain` puts other memory there; the
    tensors stay the same objects, at the same addresses. Between the two nobody may touch them."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: str,
        others: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`others`: the dtypes of the tensors that have another than `dtype`."""
        dtypes = dict.fromkeys(shapes, dtype) | dict(others or {})
        sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        self.bytes = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())
        self._arena = _arena(self.bytes, device)
        self.tensors: dict[str, torch.Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            self.tensors[name] = self._arena.bytes[start : start + sizes[name]].view(dtypes[name]).view(shape)
            start += -(-sizes[name] // _ALIGNMENT) * _ALIGNMENT
        self.held = True
        self._forget()

    def release(self) -> None:
        """Gives the memory back; what it held is lost."""
        if self.held:
            self._arena.release()
            self.held = False

    def regain(self) -> None:
        """Puts memory under the tensors again, full of NaN. torch.OutOfMemoryError where there is too little; it can be tried
        again."""
        if not self.held:
            self._arena.regain()
            self.held = True
            self._forget()

    def _forget(self) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(torch.nan)


def _arena(size: int, device: str) -> Arena:
    if device == "cpu":
        return _HostArena(size)
    from kernels.gpu import driver

    return driver.Arena(size, torch.cuda.current_device())
