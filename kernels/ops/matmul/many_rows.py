"""Many rows (training, prefill): y = a b^T on the tree of 1, 2, 4 or 8 equal leaves; persistent and warp-specialised.

A block owns tiles of 128 x BN and walks the tree of each as ring.py says. A bf16 output leaves by TMA through the shared memory
of level 1, a float32 one from registers.

`EPILOGUE` is what becomes of a root: stored (0), or, for the vocabulary (kernels.ops.logprob.gpu), folded to a node of the
log-sum-exp (1) or turned into the gradient of the logits (2).
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.ops.matmul.ring import (
    accumulator,
    descriptor,
    fill,
    idle,
    output_descriptor,
    park_layout,
    stages,
    subtree,
    tile_origin,
)


@gluon.jit
def column_of(tile, rows, columns, GROUP: gl.constexpr, BN: gl.constexpr, PART, PART_TILES):
    """(first row, first column, end of columns) of a tile. Where the columns come in parts (leaves of a vocabulary), tiles are
    counted from the start of a part, PART wide, PART_TILES tiles each."""
    row, column = tile_origin(tile, rows, columns, GROUP)
    part = column // PART_TILES
    first = part * PART + (column % PART_TILES) * BN
    return row * 128, first, (part + 1) * PART, column


@gluon.jit
def producer(
    ad,
    bd,
    a0,
    a1,
    b,
    full,
    empty,
    M,
    tiles_n,
    extent,
    apart,
    PART,
    PART_TILES,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
):
    rows = gl.cdiv(M, 128)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), rows * tiles_n, gl.num_programs(0)):
        m0, n0, end, column = column_of(tile, rows, tiles_n, GROUP, BN, PART, PART_TILES)
        for j in range(LEAVES):
            stage, phase = fill(
                ad,
                bd,
                a0,
                a1,
                b,
                full,
                empty,
                m0,
                n0,
                j * apart,
                j * extent,
                apart,
                stage,
                phase,
                BN,
                STAGES,
                A_MN,
                B_MN,
            )


@gluon.jit
def fold_columns(v):
    """[64, W] -> [64]: halves are added until one column is left: `kernels.gpu.arithmetic.fold`."""
    R: gl.constexpr = v.shape[0]
    W: gl.constexpr = v.shape[1]
    if W == 2:
        return gl.sum(v, 1)
    else:
        return fold_columns(gl.sum(gl.reshape(v, [R, 2, W // 2]), 1))


@gluon.jit
def consumer(
    yd,
    y,
    nodes,
    inverse,
    lse,
    target,
    scale,
    picked,
    a,
    b,
    full,
    empty,
    park1,
    park2,
    out,
    M,
    N,
    tiles_n,
    apart,
    PART,
    PART_TILES,
    ROW: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    EPILOGUE: gl.constexpr,
    ACC: gl.constexpr,
):
    """One warpgroup: rows ROW .. ROW + 63 of every tile of this block."""
    rows = gl.cdiv(M, 128)
    WIDE: gl.constexpr = y.dtype.element_ty == gl.float32
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), rows * tiles_n, gl.num_programs(0)):
        m0, n0, end, column = column_of(tile, rows, tiles_n, GROUP, BN, PART, PART_TILES)
        v, stage, phase = subtree(
            a,
            b,
            full,
            empty,
            park1,
            park2,
            stage,
            phase,
            apart,
            nodes,
            0,
            0,
            BN,
            STAGES,
            LEAVES,
            A_MN,
            B_MN,
            False,
            ACC,
        )
        row = m0 + ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        col = n0 + gl.arange(0, BN, gl.SliceLayout(0, ACC))
        inside = (gl.expand_dims(row, 1) < M) & (gl.expand_dims(col, 0) < gl.minimum(N, end))
        at = gl.expand_dims(row.to(gl.int64) * N, 1) + gl.expand_dims(col, 0)
        if EPILOGUE == 0 and WIDE:
            gl.store(y + at, v, mask=inside)
        elif EPILOGUE == 0:
            tma.store_wait(0)
            out.index(0).store(v.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(yd, [m0 + ROW, n0], out.index(0))
        else:
            there = row < M
            t = gl.load(inverse + row, mask=there, other=1.0)
            own = gl.load(target + row, mask=there, other=-1).to(gl.int32)
            is_own = gl.expand_dims(own, 1) == gl.expand_dims(col, 0)
            z = v * gl.expand_dims(t, 1)
            if EPILOGUE == 1:
                gl.store(picked + gl.expand_dims(row, 1) + gl.expand_dims(col * 0, 0), v, mask=is_own & inside)
                z = gl.where(inside, z, float("-inf"))
                top = gl.max(z, 1)
                safe = gl.where(there, top, 0.0)
                e = gl.exp2((z - gl.expand_dims(safe, 1)) * 1.4426950408889634)
                total = fold_columns(e)
                total = gl.convert_layout(total, gl.SliceLayout(1, ACC))
                node = nodes + (row.to(gl.int64) * tiles_n + column) * 2
                gl.store(node, top, mask=there)
                gl.store(node + 1, total, mask=there)
            else:
                g = gl.load(scale + row, mask=there, other=0.0)
                l = gl.load(lse + row, mask=there, other=0.0)
                p = gl.exp2((z - gl.expand_dims(l, 1)) * 1.4426950408889634)
                d = gl.where(is_own, gl.expand_dims(g, 1) * (1.0 - p), -(gl.expand_dims(g, 1) * p))
                d = gl.where(inside, d, 0.0)  # a part is padded to whole tiles with zeros
                tma.store_wait(0)
                out.index(0).store(d.to(gl.bfloat16))
                fence_async_shared()
                tma.async_copy_shared_to_global(yd, [m0 + ROW, column * BN], out.index(0))
    tma.store_wait(0)


@gluon.jit
def tree_kernel(
    ad,
    bd,
    yd,
    y,
    nodes,
    inverse,
    lse,
    target,
    scale,
    picked,
    M,
    N,
    tiles_n,
    extent,
    apart,
    PART,
    PART_TILES,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    EPILOGUE: gl.constexpr,
    ACC: gl.constexpr,
    PARK1: gl.constexpr,
    PARK2: gl.constexpr,
    OUT: gl.constexpr,
):
    BK: gl.constexpr = 64
    L: gl.constexpr = LEAVES
    A0: gl.constexpr = BK if A_MN else 64
    A1: gl.constexpr = 64 if A_MN else BK
    B0: gl.constexpr = BK if B_MN else BN
    B1: gl.constexpr = BN if B_MN else BK
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, A0, A1], ad.layout)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, A0, A1], ad.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, B0, B1], bd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if L > 2:
        W1: gl.constexpr = BN // 2 if L == 8 else BN
        p0 = gl.allocate_shared_memory(gl.float32, [1, 64, W1], PARK1)
        p1 = gl.allocate_shared_memory(gl.float32, [1, 64, W1], PARK1)
        o0 = p0._reinterpret(gl.bfloat16, [1, 64, BN], OUT)
        o1 = p1._reinterpret(gl.bfloat16, [1, 64, BN], OUT)
    else:
        o0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
        o1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
        p0 = o0
        p1 = o1
    if L == 8:
        q0 = gl.allocate_shared_memory(gl.float32, [1, 64, BN], PARK2)
        q1 = gl.allocate_shared_memory(gl.float32, [1, 64, BN], PARK2)
    else:
        q0 = p0
        q1 = p1
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    yd,
                    y,
                    nodes,
                    inverse,
                    lse,
                    target,
                    scale,
                    picked,
                    a0,
                    b,
                    full,
                    empty,
                    p0,
                    q0,
                    o0,
                    M,
                    N,
                    tiles_n,
                    apart,
                    PART,
                    PART_TILES,
                    0,
                    BN,
                    STAGES,
                    GROUP,
                    LEAVES,
                    A_MN,
                    B_MN,
                    EPILOGUE,
                    ACC,
                ),
            ),
            (
                consumer,
                (
                    yd,
                    y,
                    nodes,
                    inverse,
                    lse,
                    target,
                    scale,
                    picked,
                    a1,
                    b,
                    full,
                    empty,
                    p1,
                    q1,
                    o1,
                    M,
                    N,
                    tiles_n,
                    apart,
                    PART,
                    PART_TILES,
                    64,
                    BN,
                    STAGES,
                    GROUP,
                    LEAVES,
                    A_MN,
                    B_MN,
                    EPILOGUE,
                    ACC,
                ),
            ),
            (
                producer,
                (
                    ad,
                    bd,
                    a0,
                    a1,
                    b,
                    full,
                    empty,
                    M,
                    tiles_n,
                    extent,
                    apart,
                    PART,
                    PART_TILES,
                    BN,
                    STAGES,
                    GROUP,
                    LEAVES,
                    A_MN,
                    B_MN,
                ),
            ),
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
    y: torch.Tensor,
    M: int,
    N: int,
    leaves: int,
    *,
    a_mn: bool = False,
    b_mn: bool = False,
    BN: int = 128,
    group: int = 8,
    epilogue: int = 0,
    parts: int = 1,
    nodes: torch.Tensor | None = None,
    rows: dict[str, torch.Tensor] | None = None,
    apart: int | None = None,
    blocks: int = 132,
    warmup: bool = False,
):  # type: ignore[no-untyped-def]
    """a [M, K] (or, `a_mn`, [K, M]) and b [N, K] (or [K, N]) bf16 -> y [M, N]; or an epilogue over `parts` equal parts of N.

    `apart`, a multiple of 64: the leaves of a start so far apart, with zeros past their end (default: where those of b do)."""
    extent = b.shape[0 if b_mn else 1] // leaves
    apart = apart or extent
    tiles = parts * triton.cdiv(N // parts, BN)
    if nodes is None:
        nodes = y
    yd = output_descriptor(y, BN) if y.dtype == torch.bfloat16 else y
    row = rows or dict.fromkeys(("inverse", "lse", "target", "scale", "picked"), y)
    grid = (min(blocks, triton.cdiv(M, 128) * tiles),)
    run = (lambda *args, **kw: tree_kernel.warmup(*args, grid=grid, **kw)) if warmup else tree_kernel[grid]
    return run(
        descriptor(a, 64, a_mn),
        descriptor(b, BN, b_mn),
        yd,
        y,
        nodes,
        row["inverse"],
        row["lse"],
        row["target"],
        row["scale"],
        row["picked"],
        M,
        N,
        tiles,
        extent,
        apart,
        N // parts,
        tiles // parts,
        BN,
        stages(leaves, BN),
        group,
        leaves,
        a_mn,
        b_mn,
        epilogue,
        accumulator(BN),
        park_layout(BN // 2 if leaves == 8 else BN),
        park_layout(BN),
        gl.NVMMASharedLayout.get_default_for([64, BN], gl.bfloat16),
        num_warps=4,
        **({"enable_fp_fusion": False} if epilogue else {}),
    )
