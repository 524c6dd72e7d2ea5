"""The pieces of the Hopper kernels (Gluon, sm_90a): a ring of shared-memory stages that one warp fills by TMA and never stops
filling, and one leaf, which two consumer warpgroups of 64 rows take from it.

An operand may lie with its contraction index contiguous (a weight in a forward) or its row index contiguous (`MN`: gradients);
TMA boxes are then [k, rows], and wgmma reads them transposed.

Four traps of Triton 3.6 that shaped the code: one named producer warp leaves three padding
warps with too many registers, hence `idle`; a carried `previous = stage` is taken for a constant, hence `before`; peeling the
first product off the loop spills; and host descriptors cost microseconds, hence `descriptor` keeps them.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BK = 64
"""Contraction steps of one stage: 128 bytes of bf16, one swizzle row."""


@gluon.jit
def tile_origin(t, rows, columns, GROUP: gl.constexpr):
    """Tile t of a rows x columns grid, walked in bands of GROUP rows so that neighbours share operands in L2."""
    band = GROUP * columns
    first = (t // band) * GROUP
    height = gl.minimum(rows - first, GROUP)
    r = t % band
    return first + r % height, r // height


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def fill(
    ad,
    bd,
    a0,
    a1,
    b,
    full,
    empty,
    m0,
    n0,
    first_a,
    first_b,
    extent,
    stage,
    phase,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    HALVES: gl.constexpr = 2,
):
    """The stages of one leaf: `extent` steps from first_a in a and first_b in b; at least one stage, so that an empty leaf is
    a node too. HALVES: tiles of 64 rows, one for each consumer."""
    BK: gl.constexpr = 64
    for k in range(0, gl.maximum(extent, 1), BK):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, (64 * HALVES + BN) * BK * 2)
        if A_MN:
            tma.async_copy_global_to_shared(ad, [first_a + k, m0], bar, a0.index(stage))
            if HALVES == 2:
                tma.async_copy_global_to_shared(ad, [first_a + k, m0 + 64], bar, a1.index(stage))
        else:
            tma.async_copy_global_to_shared(ad, [m0, first_a + k], bar, a0.index(stage))
            if HALVES == 2:
                tma.async_copy_global_to_shared(ad, [m0 + 64, first_a + k], bar, a1.index(stage))
        if B_MN:
            tma.async_copy_global_to_shared(bd, [first_b + k, n0], bar, b.index(stage))
        else:
            tma.async_copy_global_to_shared(bd, [n0, first_b + k], bar, b.index(stage))
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def idle():
    """Fills up the producer's warpgroup."""
    pass


@gluon.jit
def product(a, b, total, use, A_MN: gl.constexpr, B_MN: gl.constexpr):
    """total + a b^T of one stage; from zero where not `use`."""
    x = a
    w = b
    if A_MN:
        x = a.permute((1, 0))
    if not B_MN:
        w = b.permute((1, 0))
    return warpgroup_mma(x, w, total, use_acc=use, is_async=True)


@gluon.jit
def blank(tile, valid, MN: gl.constexpr):
    """Zeros the contraction indices >= valid of one stage, which belong to the next leaf."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if MN:
        keep = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) < valid, 1)
    else:
        keep = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)) < valid, 0)
    v = tile.load(LAYOUT)
    keep, v = gl.broadcast(keep, v)
    tile.store(gl.where(keep, v, gl.zeros_like(v)))
    fence_async_shared()


@gluon.jit
def leaf(
    a,
    b,
    full,
    empty,
    stage,
    phase,
    extent,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    EVEN: gl.constexpr,
    ACC: gl.constexpr,
):
    """One fp32 chain over the stages of a leaf, from zero. Product i runs while stage i - 1 is handed back. Where the extent
    may be no multiple of 64 (not EVEN), the last stage is blanked past its end."""
    total = gl.zeros([64, BN], gl.float32, ACC)
    steps = extent // 64
    if not EVEN:
        steps = (gl.maximum(extent, 1) - 1) // 64
    for i in range(steps):
        mbarrier.wait(full.index(stage), phase)
        total = product(a.index(stage), b.index(stage), total, i > 0, A_MN, B_MN)
        total = warpgroup_mma_wait(1, deps=(total,))
        mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=i > 0)
        stage, phase = advance(stage, phase, STAGES)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=steps > 0)
    if not EVEN:
        mbarrier.wait(full.index(stage), phase)
        valid = extent - steps * 64
        if valid < 64:
            blank(a.index(stage), valid, A_MN)
        total = product(a.index(stage), b.index(stage), total, steps > 0, A_MN, B_MN)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def halves(v):
    """[64, W] -> two [64, W / 2]: a renaming of registers, no data moves."""
    return gl.split(gl.permute(gl.reshape(v, [64, 2, v.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def whole(low, high, ACC: gl.constexpr):
    v = gl.permute(gl.join(low, high), [0, 2, 1])
    return gl.convert_layout(gl.reshape(v, [64, 2 * low.shape[1]]), ACC, assert_trivial=True)


@gluon.jit
def bound(bounds, j, leaves):
    return gl.load(bounds + gl.minimum(j, leaves)).to(gl.int32)


@gluon.jit
def subtree(
    a,
    b,
    full,
    empty,
    park1,
    park2,
    stage,
    phase,
    extent,
    bounds,
    first_leaf,
    leaves,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    L: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    GROUPED: gl.constexpr,
    ACC: gl.constexpr,
):
    """The root of L leaves, as they come: leaf j closes as many levels as j has trailing one bits. Where a finished subtree
    waits for its sibling (128 x 128 tile, float32):

        level 0  registers
        level 1  8 leaves: left half registers, right half shared memory (32 KB);  4 leaves: shared memory (64 KB)
        level 2  shared memory (64 KB)

    Leaves are `extent` long, or, where GROUPED, lie between `bounds` (those past `leaves` are empty: they add +0, which changes
    no bit of a sum that started from +0). The next bound is loaded while a leaf runs."""
    if GROUPED:
        first = bound(bounds, first_leaf, leaves)
        last = bound(bounds, first_leaf + 1, leaves)
    for j in gl.static_range(L):
        if GROUPED:
            extent = last - first
            first = last
            last = bound(bounds, first_leaf + j + 2, leaves)
        v, stage, phase = leaf(a, b, full, empty, stage, phase, extent, BN, STAGES, A_MN, B_MN, not GROUPED, ACC)
        if j % 2 == 0:
            level0 = v
        else:
            v = level0 + v
            if j % 4 == 1 and L > 2:
                if j == 1:
                    tma.store_wait(0)  # the previous tile's output leaves through the same memory
                if L == 8:
                    level1, v_high = halves(v)
                    park1.index(0).store(v_high)
                else:
                    park1.index(0).store(v)
            elif j % 4 == 3:
                if L == 8:
                    v_low, v_high = halves(v)
                    v_low = level1 + v_low
                    v_high = park1.index(0).load(v_high.type.layout) + v_high
                    v = whole(v_low, v_high, ACC)
                    if j == 3:
                        park2.index(0).store(v)
                    else:
                        v = park2.index(0).load(ACC) + v
                else:
                    v = park1.index(0).load(ACC) + v
    return v, stage, phase


def park_layout(width: int):  # type: ignore[no-untyped-def]
    """float32 [64, width] in the order of the accumulator's registers: (2 columns, 2 rows 8 apart), lanes, warps, rest."""
    bases = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
    column = 8
    while column < width:
        bases.append([0, column])
        column *= 2
    return gl.SharedLinearLayout(bases)


def accumulator(BN: int):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])


def stages(L: int, BN: int) -> int:
    """What is left of 227 KB of shared memory after the parked levels (or the output tile) goes to the ring."""
    parked = {8: 1.5, 4: 1.0}.get(L, 0.5) * 128 * BN * 4
    return int((232448 - 1024 - parked) // ((128 + BN) * BK * 2))


def descriptor(t: torch.Tensor, rows: int, mn: bool = False) -> TensorDescriptor:
    """TMA boxes of `rows` x BK of an operand [rows, k]; where `mn`, `t` is given as it lies, [k, rows]."""
    block = [BK, rows] if mn else [rows, BK]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, _box(*block))


def output_descriptor(y: torch.Tensor, BN: int) -> TensorDescriptor:
    return TensorDescriptor(y, list(y.shape), list(y.stride()), [64, BN], _box(64, BN))


def _box(rows: int, columns: int):  # type: ignore[no-untyped-def]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


def reachable(t: torch.Tensor) -> bool:
    """Whether TMA can read `t`: contiguous rows, 16-byte aligned base and row stride."""
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1]
