"""Names what Triton's versions call differently. No other module asks for a version.

| triton | comes with torch | what it renamed |
|---|---|---|
| 3.6 | 2.11 | |
| 3.7 | 2.12, 2.13 | `thread_barrier` is `barrier`; one compiled launcher takes every kernel's arguments as one sequence |
| 3.8 | 2.14 | the descriptors' encoder takes a third argument |
| 3.9 | 2.15 | `_reinterpret` is `reinterpret`; `async_copy_global_to_shared` is `async_load`, its reverse `async_store` |

Bits do not depend on the version: the recorded hashes of every op are one file for all (tests/kernels/gpu/test_hashes.py).
"""

from collections.abc import Callable, Sequence
from inspect import getclosurevars
from typing import Any

import triton
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core
from triton.runtime import driver

from kernels.device import UnsupportedError

OLDEST, NEWEST = (3, 6), (3, 9)
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

if not OLDEST <= VERSION <= NEWEST:
    raise UnsupportedError(
        f"triton {triton.__version__} is not one that samebit's kernels were compiled with ({OLDEST[0]}.{OLDEST[1]} to "
        f"{NEWEST[0]}.{NEWEST[1]}): install the torch that pyproject.toml asks for, and the triton that it brings"
    )

aggregate = core._aggregate
"""A class whose fields are values of a kernel. (A NamedTuple forgets constants when it is assigned.)"""

thread_barrier = gl.thread_barrier if VERSION < (3, 7) else gl.barrier
"""Waits for all threads of the current warps."""

load_boxes = tma.async_copy_global_to_shared if VERSION < (3, 9) else tma.async_load
"""(descriptor, coordinates, barrier, buffer): starts to copy a box from global memory; the barrier counts its bytes."""

store_boxes = tma.async_copy_shared_to_global if VERSION < (3, 9) else tma.async_store
"""(descriptor, coordinates, buffer): starts to copy a box to global memory."""

if VERSION < (3, 9):

    @gluon.jit
    def reinterpret(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory under another dtype, shape and layout of the same bytes: the whole of it, as 3.8 takes no part."""
        return buffer._reinterpret(DTYPE, SHAPE, LAYOUT)

else:

    @gluon.jit
    def reinterpret(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory under another dtype, shape and layout of the same bytes: the whole of it, as 3.8 takes no part."""
        return buffer.reinterpret(DTYPE, SHAPE, LAYOUT)


def encode(descriptor: Any, meta: dict[str, Any]) -> list[Any]:
    """Returns what a launcher takes for a tensor descriptor of two dimensions: the encoded map, its shape, its strides."""
    return make_tensordesc_arg(descriptor, meta) if VERSION < (3, 8) else make_tensordesc_arg(descriptor, meta, None)


def launcher(compiled: Any, descriptors: bool) -> Callable[..., None] | None:
    """Returns `f(x, y, z, stream, values)`, which launches a compiled kernel without describing its arguments again, or None
    where it needs memory that only Triton's own call allocates. `values`: every argument, constants too, descriptors
    encoded."""
    run, metadata = compiled.run, compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    head = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if VERSION < (3, 7):
        inner = getclosurevars(run.launch).nonlocals["launcher"] if descriptors else run.launch
        head = (*head, None, None, compiled.packed_metadata, None, None, None)

        def flat(x: int, y: int, z: int, stream: int, values: Sequence[Any]) -> None:
            inner(x, y, z, stream, *head, *values)

        return flat
    whole = driver.active.utils.launch
    head = (*head, compiled.packed_metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)

    def at_once(x: int, y: int, z: int, stream: int, values: Sequence[Any]) -> None:
        whole(x, y, z, stream, *head, values)

    return at_once
