"""Memory straight from the CUDA driver, for what torch's allocator does not offer: physical memory that is given back and
regained at the same virtual address (`Arena`, so that captured graphs stay valid), and memory that several processes see
(`shared`, `attach`)."""

import contextlib
import ctypes
from functools import cache
from typing import Any

import torch

_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, ..._READWRITE
_LAZY_PEERS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class DriverError(RuntimeError):
    """Names a call that the CUDA driver refused."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Kind(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any, size: int = 0) -> None:
    """Calls a driver function in the context of torch's current device. `size`: the bytes it is to allocate."""
    torch.cuda.mem_get_info()  # makes that context, and makes it current
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        if code == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise _out_of_memory(size)
        raise DriverError(f"{name}: {reason} ({code})")


def _out_of_memory(size: int) -> torch.OutOfMemoryError:
    """In the words of torch's own allocator."""
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {size / 2**30:.2f} GiB. The GPU has a total capacity of {total:.2f} GiB of "
        f"which {free:.2f} GiB is free"
    )


class _Bytes:
    """What torch.as_tensor understands; the tensor keeps it, and with it `owner`, alive."""

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _tensor(address: int, size: int, device: int, owner: object = None) -> torch.Tensor:
    """Returns uint8 [size] over memory that `owner` frees."""
    return torch.as_tensor(_Bytes(address, size, owner), device=f"cuda:{device}")


class _Range:
    """Virtual addresses, with physical memory under them or without."""

    def __init__(self, size: int, device: int) -> None:
        if size > torch.cuda.mem_get_info(device)[1]:
            raise _out_of_memory(size)
        self.device, self.handle = device, ctypes.c_uint64()
        self.kind = _Kind(type=_PINNED, location=_Location(_ON_DEVICE, device))
        unit = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(self.kind), 0)
        self.size = ctypes.c_size_t(-(-max(size, 1) // unit.value) * unit.value)
        self.address = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(self.address), self.size, *(ctypes.c_uint64(0),) * 3)

    def map(self) -> None:
        handle = ctypes.c_uint64()
        what = (ctypes.byref(handle), self.size, ctypes.byref(self.kind), ctypes.c_uint64(0))
        try:
            _call("cuMemCreate", *what, size=self.size.value)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what torch holds and does not use
            _call("cuMemCreate", *what, size=self.size.value)
        _call("cuMemMap", self.address, self.size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
        self.handle = handle
        access = _Access(_Location(_ON_DEVICE, self.device), _READ_WRITE)
        _call("cuMemSetAccess", self.address, self.size, ctypes.byref(access), ctypes.c_size_t(1))

    def unmap(self) -> None:
        torch.cuda.synchronize(self.device)  # nothing in flight reads it
        _call("cuMemUnmap", self.address, self.size)
        _call("cuMemRelease", self.handle)
        self.handle = ctypes.c_uint64()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the process may be ending, and the driver with it
            if self.handle.value:
                self.unmap()
            _call("cuMemAddressFree", self.address, self.size)


class Arena:
    """Holds `size` bytes of the device at an address that stays: `bytes` is uint8 [size, rounded up]. Between `release` and
    `regain` nobody may touch it; what it held is lost. Freed when the last tensor over it is gone."""

    def __init__(self, size: int, device: int) -> None:
        self._range = _Range(size, device)
        self._range.map()
        self.bytes = _tensor(self._range.address.value, self._range.size.value, device, self._range)

    def release(self) -> None:
        """Gives the physical memory back to the device."""
        if self._range.handle.value:
            self._range.unmap()

    def regain(self) -> None:
        """Puts physical memory at the same address; it holds anything. torch.OutOfMemoryError where there is too little."""
        if not self._range.handle.value:
            self._range.map()


class _Allocation:
    def __init__(self, size: int) -> None:
        self.address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(self.address), ctypes.c_size_t(size), size=size)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
            _call("cuMemFree_v2", self.address)


def shared(size: int) -> tuple[torch.Tensor, bytes]:
    """Returns uint8 [size] on the current device, freed when the last tensor over it is gone, and the handle by which
    other processes `attach` it. They must let go of it first."""
    memory, handle = _Allocation(size), _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), memory.address)
    return _tensor(memory.address.value, size, torch.cuda.current_device(), memory), bytes(handle.reserved)


class _Attachment:
    def __init__(self, handle: bytes) -> None:
        self.address = ctypes.c_uint64()
        struct = _Handle((ctypes.c_ubyte * 64)(*handle))
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(self.address), struct, ctypes.c_uint(_LAZY_PEERS))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
            _call("cuIpcCloseMemHandle", self.address)


def attach(handle: bytes, size: int) -> torch.Tensor:
    """Returns the `shared` memory of another process on the current device, until the last tensor over it is gone."""
    memory = _Attachment(handle)
    return _tensor(memory.address.value, size, torch.cuda.current_device(), memory)
