"""A sum over tokens (dW): y = a^T b, with one leaf for each group of sequences, at offsets that may be anything.

The ring and the tree of ring.py over operands whose token index is not contiguous. A stage that crosses into the next group is
blanked past the end of its own. More than four groups go by fours: the root of a set is a node of level 2, and levels 2 and
above of the binary counter wait in a scratch tile that stays in L2. (Eight on chip, as in many_rows.py, leave no registers for
the blanked stage.)
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.ops.matmul.ring import (
    accumulator,
    bound,
    descriptor,
    fill,
    idle,
    park_layout,
    stages,
    subtree,
    tile_origin,
)


@gluon.jit
def producer(
    ad,
    bd,
    a0,
    a1,
    b,
    full,
    empty,
    bounds,
    leaves,
    sets,
    M,
    N,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    L: gl.constexpr,
):
    rows = gl.cdiv(M, 128)
    columns = gl.cdiv(N, BN)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = tile_origin(tile, rows, columns, GROUP)
        first = bound(bounds, 0, leaves)
        last = bound(bounds, 1, leaves)
        for j in range(sets * L):
            after = bound(bounds, j + 2, leaves)  # arrives while this leaf is filled
            stage, phase = fill(
                ad,
                bd,
                a0,
                a1,
                b,
                full,
                empty,
                row * 128,
                column * BN,
                first,
                first,
                last - first,
                stage,
                phase,
                BN,
                STAGES,
                True,
                True,
            )
            first = last
            last = after


@gluon.jit
def consumer(
    y,
    scratch,
    a,
    b,
    full,
    empty,
    park1,
    bounds,
    leaves,
    sets,
    levels,
    M,
    N,
    ROW: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    L: gl.constexpr,
    MORE: gl.constexpr,
    ACC: gl.constexpr,
):
    """One warpgroup: rows ROW .. ROW + 63 of every tile of this block."""
    rows = gl.cdiv(M, 128)
    columns = gl.cdiv(N, BN)
    r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, ACC)), 1)
    c = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ACC)), 0)
    size: gl.constexpr = 64 * BN
    mine = scratch + (gl.program_id(0) * 2 + ROW // 64).to(gl.int64) * (levels * size) + r * BN + c
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = tile_origin(tile, rows, columns, GROUP)
        v = gl.zeros([64, BN], gl.float32, ACC)
        for i in range(sets):
            v, stage, phase = subtree(
                a,
                b,
                full,
                empty,
                park1,
                park1,
                stage,
                phase,
                0,
                bounds,
                i * L,
                leaves,
                BN,
                STAGES,
                L,
                True,
                True,
                True,
                ACC,
            )
            if MORE:
                level = 0
                n = i
                while n % 2 == 1:
                    v = gl.load(mine + level * size) + v
                    level += 1
                    n = n // 2
                if i + 1 < sets:
                    gl.store(mine + level * size, v)
                else:  # a count that is no power of two leaves finished subtrees on the left: add them from the right
                    up = level + 1
                    while (sets >> up) > 0:
                        if (sets >> up) % 2 == 1:
                            v = gl.load(mine + up * size) + v
                        up += 1
        at = (row * 128 + ROW + r).to(gl.int64) * N + column * BN + c
        gl.store(y + at, v.to(y.dtype.element_ty), mask=(row * 128 + ROW + r < M) & (column * BN + c < N))


@gluon.jit(do_not_specialize=["leaves", "sets", "levels"])
def grouped_kernel(
    ad,
    bd,
    y,
    scratch,
    bounds,
    leaves,
    sets,
    levels,
    M,
    N,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    L: gl.constexpr,
    MORE: gl.constexpr,
    ACC: gl.constexpr,
    PARK: gl.constexpr,
):
    BK: gl.constexpr = 64
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, 64], ad.layout)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, 64], ad.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], bd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    p0 = gl.allocate_shared_memory(gl.float32, [1, 64, BN], PARK)
    p1 = gl.allocate_shared_memory(gl.float32, [1, 64, BN], PARK)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    y,
                    scratch,
                    a0,
                    b,
                    full,
                    empty,
                    p0,
                    bounds,
                    leaves,
                    sets,
                    levels,
                    M,
                    N,
                    0,
                    BN,
                    STAGES,
                    GROUP,
                    L,
                    MORE,
                    ACC,
                ),
            ),
            (
                consumer,
                (
                    y,
                    scratch,
                    a1,
                    b,
                    full,
                    empty,
                    p1,
                    bounds,
                    leaves,
                    sets,
                    levels,
                    M,
                    N,
                    64,
                    BN,
                    STAGES,
                    GROUP,
                    L,
                    MORE,
                    ACC,
                ),
            ),
            (producer, (ad, bd, a0, a1, b, full, empty, bounds, leaves, sets, M, N, BN, STAGES, GROUP, L)),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bounds: torch.Tensor,
    y: torch.Tensor,
    *,
    BN: int = 128,
    group: int = 8,
    blocks: int = 132,
    warmup: bool = False,
):  # type: ignore[no-untyped-def]
    """a [T, M], b [T, N] bf16, bounds int64 [leaves + 1] on the device -> y [M, N] (float32, or rounded once)."""
    M, N = a.shape[1], b.shape[1]
    grid = (min(blocks, triton.cdiv(M, 128) * triton.cdiv(N, BN)),)
    leaves = bounds.numel() - 1
    L = min(4, triton.next_power_of_2(leaves))
    sets = triton.cdiv(leaves, L)
    levels = sets.bit_length()
    scratch = y.new_empty(grid[0] * 2 * levels * 64 * BN if sets > 1 else 1, dtype=torch.float32)
    run = (lambda *args, **kw: grouped_kernel.warmup(*args, grid=grid, **kw)) if warmup else grouped_kernel[grid]
    return run(
        descriptor(a, 64, True),
        descriptor(b, BN, True),
        y,
        scratch,
        bounds,
        leaves,
        sets,
        levels,
        M,
        N,
        BN,
        stages(4, BN),
        group,
        L,
        sets > 1,
        accumulator(BN),
        park_layout(BN),
        num_warps=4,
    )
