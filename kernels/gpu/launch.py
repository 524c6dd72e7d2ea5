"""Launches a compiled kernel in some microseconds. Every GPU kernel is launched here.

`kernel[grid](...)` of Triton describes every argument, formats every option and encodes every TMA descriptor on each call:
50 to 200 us for a kernel with three of them. `launch` does so once. It remembers compiled kernels by what Triton specialises
on (types, alignments, constants, which integers are 1 or multiples of 16), and descriptors by what they encode, an address and
a shape: one that outlives its tensor is right for the next tensor of that shape at that address.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from kernels.gpu.dialect import encode, launcher
from kernels.gpu.overlap import is_early


class _Address(NamedTuple):
    """What a descriptor needs of its tensor."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


class Descriptor:
    """Describes boxes of a matrix for TMA."""

    __slots__ = ("kind", "tensor", "words")

    def __init__(self, tensor: TensorDescriptor) -> None:
        self.tensor = tensor
        self.kind = (tensor.base.dtype, tensor.layout.swizzle_byte_width, *tensor.block_shape)
        self.words: list[Any] | None = None  # what the launcher takes: the encoded descriptor, shape, strides


_OPERANDS = {torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv}


@cache
def box_layout(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16):  # type: ignore[no-untyped-def]
    """Returns [rows, columns] of a tensor core's operand in shared memory, as TMA and wgmma take it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _OPERANDS[dtype])


_PLAIN_LAYOUT = gl.NVMMASharedLayout(0, 32, 2)  # float32, one row after the other
_TILE_LAYOUT = gl.NVMMASharedLayout(128, 32, 2)  # float32, as a tensor core's tile is written without bank conflicts


@lru_cache(maxsize=1 << 14)
def _descriptor(
    pointer: int, dtype: torch.dtype, shape: tuple, strides: tuple, rows: int, columns: int, plain: bool = True
) -> Descriptor:
    tensor = _Address(pointer, dtype)
    of_float32 = _PLAIN_LAYOUT if plain else _TILE_LAYOUT
    layout = box_layout(rows, columns, dtype) if dtype in _OPERANDS else of_float32
    return Descriptor(TensorDescriptor(tensor, list(shape), list(strides), [rows, columns], layout))


def boxes(t: torch.Tensor, rows: int, columns: int) -> Descriptor:
    """Describes boxes of `rows` x `columns` of a matrix, bf16 or e4m3 for products, float32 to be read; zeros past its end."""
    return _descriptor(t.data_ptr(), t.dtype, t.shape, t.stride(), rows, columns)


def tile_boxes(t: torch.Tensor, rows: int, columns: int) -> Descriptor:
    """Describes boxes of a float32 matrix to be written from the registers of a tensor core's tile."""
    return _descriptor(t.data_ptr(), t.dtype, t.shape, t.stride(), rows, columns, False)


def head_boxes(t: torch.Tensor, tokens: int, columns: int | None = None) -> Descriptor:
    """Describes boxes of `tokens` and `columns` (default: all) of one head of bf16 [tokens, heads, head_dim], in which heads
    and head_dim are contiguous."""
    T, heads, D = t.shape
    return _descriptor(t.data_ptr(), t.dtype, (T, heads * D), (t.stride(0), 1), tokens, columns or D)


def heads_contiguous(t: torch.Tensor) -> torch.Tensor:
    """Returns [rows, heads, head_dim] with heads and head_dim contiguous, a copy where they are not; the row stride is free."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


class Launch(NamedTuple):
    """Holds one launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


class _Kernel(NamedTuple):
    """A compiled kernel on one device."""

    run: Callable[..., None] | None  # what launches it from values alone; None: Triton's own call
    encodings: list[Any]  # of its descriptors
    constants: tuple  # kept, as the key names some by their address


_kernels: dict[tuple, _Kernel] = {}
_roles: dict[int, tuple[int, ...]] = {}
_WORDS = [None] * 5  # a descriptor, its shape, its strides
_PLAIN = {int, bool, float, str, type(None)}
_taker: Callable[[Launch], None] | None = None


@contextmanager
def handed_to(take: Callable[[Launch], None]) -> Iterator[None]:
    """Hands every launch of this process to `take` instead of running it."""
    global _taker
    before, _taker = _taker, take
    try:
        yield
    finally:
        _taker = before


def _roles_of(kernel: Any) -> tuple[int, ...]:
    """Of each parameter: 0 a constant, 1 an integer that is not specialised, 2 the rest."""
    roles = tuple(0 if p.is_constexpr else 1 if p.do_not_specialize else 2 for p in kernel.params)
    return _roles.setdefault(id(kernel), roles)


def _describe(args: tuple, roles: tuple[int, ...], key: list, values: list, descriptors: list) -> None:
    """Appends what Triton specialises on to `key`, what the launcher takes to `values`, and to `descriptors` where they go."""
    name, value = key.append, values.append
    for a, role in zip(args, roles, strict=True):
        kind = type(a)
        if role == 0:
            name(a if kind in _PLAIN else id(a))
            value(a)
        elif kind is int:
            wide = a.bit_length() > 31
            name(wide if role == 1 else 5 if a == 1 else (2 if a % 16 else 3) + 8 * wide)
            value(a)
        elif kind is Descriptor:
            name(a.kind)
            descriptors.append((len(values), a))
            values.extend(_WORDS)
        elif kind is torch.Tensor or isinstance(a, torch.Tensor):
            pointer = a.data_ptr()
            name(a.dtype)
            name(pointer & 15)
            value(pointer)
        elif isinstance(a, tuple):
            inside: list[Any] = []
            _describe(a, (2,) * len(a), key, inside, descriptors)
            value(tuple(inside))
        else:  # a float
            name(kind)
            value(a)


def described(launch: Launch) -> tuple:
    """Returns what Triton specialises a launch on, in the same words in every process."""
    given = list(zip(launch.args, _roles_of(launch.kernel), strict=True))
    constants = [str(a) for a, role in given if role == 0]
    key: list[Any] = []
    _describe(*zip(*(pair for pair in given if pair[1]), strict=True), key, [], [])
    return (name_of(launch.kernel), *map(str, key), *constants, *sorted(launch.options.items()))


def name_of(kernel: Any) -> str:
    """Returns the module and function of a kernel."""
    return f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"


def compile_only(launch: Launch) -> Any:
    """Compiles what a launch would run, and returns it."""
    return launch.kernel.warmup(*map(_plain, launch.args), grid=launch.grid, **launch.options)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs kernel[grid](*args, **options). `args`: every parameter in order, constants too; `options`: num_warps and others."""
    if is_early(kernel):
        options["launch_pdl"] = True
    if _taker is not None:
        return _taker(Launch(kernel, grid, args, options))
    device, roles = driver.active.get_current_device(), _roles.get(id(kernel)) or _roles_of(kernel)
    key: list[Any] = [id(kernel), device, *options.items()]
    values: list[Any] = []
    descriptors: list[tuple[int, Descriptor]] = []
    _describe(args, roles, key, values, descriptors)
    at = tuple(key)
    found = _kernels.get(at)
    if found is None:
        compiled = kernel[grid](*map(_plain, args), **options)
        constants = kernel, *(a for a, role in zip(args, roles, strict=True) if role == 0)
        encodings = compiled.metadata.tensordesc_meta or []
        _kernels[at] = _Kernel(launcher(compiled, bool(descriptors)), encodings, constants)
        return None
    if found.run is None:
        kernel[grid](*map(_plain, args), **options)
        return None
    for i, (first, d) in enumerate(descriptors):
        if d.words is None:
            d.words = encode(d.tensor, found.encodings[i])
        values[first : first + 5] = d.words
    x, y, z = (*grid, 1, 1)[:3]
    found.run(x, y, z, driver.active.get_current_stream(device), values)
    return None


def _plain(a: Any) -> Any:
    return a.tensor if type(a) is Descriptor else a


def cdiv(a: int, b: int) -> int:
    """Returns ceil(a / b). Triton's own takes 5 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Rounds n >= 1 up to a power of two."""
    return 1 << (n - 1).bit_length()
