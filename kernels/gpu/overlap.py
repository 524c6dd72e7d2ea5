"""Lets a kernel's blocks start while the kernel before it still runs (programmatic dependent launch, compute capability 9.0).

Between two short kernels of a decode step the card is idle: the last blocks of the first end, then those of the second are set
up. A kernel that `@early` marks is set up meanwhile. It begins with `previous_done()`: until that returns, it must neither read
what other kernels write nor write at all; weights may be brought near (`bring_near`), as a copy in L2 is never stale. A kernel
that waits has waited for all before it too, since each of them has waited in turn, and one that is not marked starts when
everything before it is done. So the order of memory accesses is that of kernels that run one after another, and no bit depends
on it. `kernels.gpu.ahead` refuses a marked kernel that reads or writes before it waits.

`previous_done` also lets the kernel after this one be set up, as soon as all blocks of this one have come so far: those that
wait take no block's place.
"""

from functools import cache
from typing import Any, TypeVar

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver

Kernel = TypeVar("Kernel")

_WAIT = tl.constexpr("griddepcontrol.wait; griddepcontrol.launch_dependents; // $0")
_NEAR = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; // $0")


def early(kernel: Kernel) -> Kernel:
    """Marks a kernel whose first statement is `previous_done()`; `kernels.gpu.launch` then launches it early."""
    kernel.early = True  # type: ignore[attr-defined]
    return kernel


def is_early(kernel: Any) -> bool:
    """Says whether a kernel is marked, and the card can launch it early."""
    return getattr(kernel, "early", False) and _cards_can()


@cache
def _cards_can() -> bool:
    return driver.active.get_current_target().arch >= 90


@triton.jit
def previous_done():
    """Waits until every kernel before this one is done and its writes are seen, then lets the next be set up."""
    if cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def bring_near(pointers, BYTES: tl.constexpr):
    """Starts to copy BYTES (a multiple of 16) from each pointer (16-byte aligned) to L2, where the card can."""
    if cuda_capability_geq(9, 0):
        size = tl.zeros(pointers.shape, tl.int32) + BYTES
        tl.inline_asm_elementwise(_NEAR, "=r,l,r", [pointers.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def all_previous_done():
    """Is `previous_done` for kernels in Gluon. One warp of a block is enough, if the others wait for it."""
    gl.inline_asm_elementwise(_WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bring_rows_near(pointers, sizes):
    """Starts to copy so many bytes (a multiple of 16) from each pointer (16-byte aligned) to L2."""
    gl.inline_asm_elementwise(_NEAR, "=r,l,r", [pointers.to(gl.int64), sizes], dtype=gl.int32, is_pure=False, pack=1)
