"""A leaf of block-scaled FP8, taken from the ring of kernels.gpu.hopper.ring: a stage is one block of 128 contraction steps.

    d   = one wgmma chain of four 32-wide e4m3 steps, from zero
    acc = fma(d, sx * sw, acc)

Triton adds what is inside the tensor core to other registers after so many steps as `max_num_imprecise_acc` says, and each
number has other bits. Left out, it is 2^30 on a card of 9.0: never. mma.sync has bits of its own too, so every product is a
wgmma; which operand is its M changes nothing.

The scales of the next block are on their way while the product of this one runs. What there is to be loaded is contiguous, and
in bounds without a mask: `kernels.ops.quantize.hopper.column_scales`."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from kernels.gpu.hopper.ring import accumulator, advance, product

STEPS = gl.constexpr(32)
"""Contraction steps of one instruction."""


class AllScales(NamedTuple):
    """Says where the scales of both operands lie."""

    x: Any  # float32, as `column_scales` returns them
    apart: Any  # from a block to the next
    w: Any  # float32 [N / 128, K / 128], a row's contiguous
    row: Any  # from a row to the next


class Scales(NamedTuple):
    """Says where the scales of one tile lie."""

    x: Any  # those of its first row of x, in block 0
    apart: Any
    w: Any  # those of its rows of w, all within one block
    last: Any  # the last block


@gluon.jit
def scales_at(scales, m0, n0, last):
    """Returns the scales of the tile of rows m0 of x and n0 of w."""
    return Scales(scales.x + m0, scales.apart, scales.w + (n0 // 128).to(gl.int64) * scales.row, last)


@gluon.jit
def scales_of(scales, block, BN: gl.constexpr, AXIS: gl.constexpr):
    """Loads the scales of a block for an accumulator of 64 x BN, along whose AXIS x's scale is constant: (of x, of w)."""
    rows = gl.arange(0, BN if AXIS == 0 else 64, gl.SliceLayout(AXIS, accumulator(BN, STEPS)))
    return gl.load(scales.x + block * scales.apart + rows), gl.load(scales.w + block)


@gluon.jit
def pinned_zeros(BN: gl.constexpr):
    """Returns registers for a product, zeroed before any product runs."""
    d = gl.zeros([64, BN], gl.float32, accumulator(BN, STEPS))
    return warpgroup_mma_wait(0, deps=(d,))


@gluon.jit
def leaf(ring, a, scales, sx, sw, d, stage, phase, first, blocks, AXIS: gl.constexpr):
    """Computes the chain of `blocks` blocks from `first`. AXIS: see `scales_of`.

    sx, sw: the scales of the first block; d: registers for a product. Returns (acc, scales of the block after, d, the ring's
    next stage and phase)."""
    total = gl.zeros([64, ring.BN], gl.float32, accumulator(ring.BN, STEPS))
    for block in range(first, first + blocks):
        mbarrier.wait(ring.full.index(stage), phase)
        d = product(a.index(stage), ring.b.index(stage), d, False, False, False)
        scale = gl.expand_dims(sx * sw, AXIS)
        sx, sw = scales_of(scales, gl.minimum(block + 1, scales.last), ring.BN, AXIS)
        d = warpgroup_mma_wait(0, deps=(d,))
        mbarrier.arrive(ring.empty.index(stage), count=1)
        total = gl.fma(d, scale, total)
        stage, phase = advance(stage, phase, ring.STAGES)
    return total, sx, sw, d, stage, phase
