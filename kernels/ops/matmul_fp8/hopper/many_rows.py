"""Many rows (training, prefill): y = X W^T of block-scaled FP8 on the tree of 1, 2, 4 or 8 equal leaves; persistent and
warp-specialised.

Ring, producer and output are those of kernels.ops.matmul.hopper.many_rows; the leaf is that of leaf.py. One warpgroup
multiplies its block from zero while the other adds its own, scaled: neither drains the ring. A product has registers of its
own, so of a 128 x 128 tile one level less of the tree waits for its sibling there than in bf16: level 0 in registers, levels 1
and 2 in shared memory, or, where `NODES`, level 2 in global memory (which L2 holds), so that the ring has two stages more.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from kernels.gpu.card import card_of
from kernels.gpu.dialect import reinterpret
from kernels.gpu.hopper.pace import PERIOD
from kernels.gpu.hopper.ring import (
    STAGE_BYTES,
    accumulator,
    allocate,
    box_layout,
    descriptor,
    flat,
    idle,
    park_layout,
    tile_of,
)
from kernels.gpu.launch import boxes, cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.workspace import counters
from kernels.ops.matmul.hopper.many_rows import Shape, producer, store_box, tile_at
from kernels.ops.matmul_fp8.hopper.leaf import STEPS, AllScales, leaf, pinned_zeros, scales_at, scales_of

BN = 128
"""Columns of a tile: one block of w, so that its scale is one number. A tile has as many rows, in two halves."""


@gluon.jit
def subtree(ring, a, parked, node, scales, sx, sw, d, stage, phase, blocks, L: gl.constexpr, NODES: gl.constexpr):
    """Returns the root of L leaves of `blocks` blocks: leaf j closes as many levels as j has trailing one bits. A finished
    subtree of level 0 waits for its sibling in registers, one of level 1 in parked[0], one of level 2 in parked[1] or at
    `node`."""
    ACC: gl.constexpr = accumulator(ring.BN, STEPS)
    for j in gl.static_range(L):
        v, sx, sw, d, stage, phase = leaf(ring, a, scales, sx, sw, d, stage, phase, j * blocks, blocks, 1)
        if j % 2 == 0:
            level0 = v
        else:
            v = level0 + v
            if L > 2:
                if j == 1:
                    tma.store_wait(0)  # the previous tile's output leaves through the same memory
                if j % 4 == 1:
                    parked.index(0).store(v)
                else:
                    v = parked.index(0).load(ACC) + v
                    if L == 8 and NODES:
                        inside = flat(v)
                        at = node + gl.arange(0, 64 * ring.BN, inside.type.layout)
                        if j == 3:
                            gl.store(at, inside, cache_modifier=".cg")
                        else:
                            v = tile_of(gl.load(at, cache_modifier=".cg") + inside, ring.BN, ACC)
                    elif L == 8 and j == 3:
                        parked.index(1).store(v)
                    elif L == 8:
                        v = parked.index(1).load(ACC) + v
    return v, d, stage, phase


@gluon.jit
def consumer(
    ring,
    a,
    parked,
    out,
    yd,
    y,
    nodes,
    all_scales,
    shape,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    NODES: gl.constexpr,
):
    """Computes with one warpgroup: rows 64 HALF .. 64 HALF + 63 of every tile of this block."""
    BN: gl.constexpr = ring.BN
    ACC: gl.constexpr = accumulator(BN, STEPS)
    blocks = shape.extent // ring.BK
    last = blocks * LEAVES - 1
    tiles = gl.cdiv(shape.M, 128) * shape.columns
    node = nodes + (gl.program_id(0) * 2 + HALF) * (64 * BN)
    stage = 0
    phase = 0
    d = pinned_zeros(BN)
    m0, column, n0, end = tile_at(gl.program_id(0), shape, GROUP, BN, False)
    scales = scales_at(all_scales, m0 + 64 * HALF, n0, last)
    sx, sw = scales_of(scales, 0, BN, 1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v, d, stage, phase = subtree(ring, a, parked, node, scales, sx, sw, d, stage, phase, blocks, LEAVES, NODES)
        row = m0 + 64 * HALF
        column0 = n0
        m0, column, n0, end = tile_at(gl.minimum(tile + gl.num_programs(0), tiles - 1), shape, GROUP, BN, False)
        scales = scales_at(all_scales, m0 + 64 * HALF, n0, last)
        sx, sw = scales_of(scales, 0, BN, 1)  # of the next tile, on their way while this one is stored
        if y.dtype.element_ty == gl.float32:
            rows = row + gl.arange(0, 64, gl.SliceLayout(1, ACC))
            columns = column0 + gl.arange(0, BN, gl.SliceLayout(0, ACC))
            at = gl.expand_dims(rows.to(gl.int64) * shape.N, 1) + gl.expand_dims(columns, 0)
            gl.store(y + at, v, mask=gl.expand_dims(rows < shape.M, 1) & gl.expand_dims(columns < shape.N, 0))
        else:
            store_box(v, out, yd, row, column0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "columns", "extent"])
def tree_kernel(
    ad,
    bd,
    yd,
    y,
    nodes,
    pace,
    x_scales,
    apart,
    w_scales,
    ldw_scales,
    M,
    N,
    columns,
    extent,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    NODES: gl.constexpr,
    EVERY: gl.constexpr,
):
    """Computes all tiles of X W^T on the tree of leaves."""
    OUT: gl.constexpr = box_layout(64, BN)
    PARK: gl.constexpr = park_layout(BN)
    LEVELS: gl.constexpr = 2 if LEAVES == 8 and not NODES else 1
    shape = Shape(M, N, columns, N, columns, extent, extent)
    all_scales = AllScales(x_scales, apart, w_scales, ldw_scales)
    ring = allocate(ad, bd, BN, STAGES, False, False)
    if LEAVES > 2:
        park0 = gl.allocate_shared_memory(gl.float32, [LEVELS, 64, BN], PARK)
        park1 = gl.allocate_shared_memory(gl.float32, [LEVELS, 64, BN], PARK)
        o0 = reinterpret(park0, gl.bfloat16, [2 * LEVELS, 64, BN], OUT)
        o1 = reinterpret(park1, gl.bfloat16, [2 * LEVELS, 64, BN], OUT)
    else:
        o0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
        o1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
        park0 = o0
        park1 = o1
    gl.warp_specialize(
        [
            (consumer, (ring, ring.a0, park0, o0, yd, y, nodes, all_scales, shape, 0, GROUP, LEAVES, NODES)),
            (consumer, (ring, ring.a1, park1, o1, yd, y, nodes, all_scales, shape, 1, GROUP, LEAVES, NODES)),
            (producer, (ring, ad, bd, pace, shape, GROUP, LEAVES, False, EVERY)),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def stages(shared: int, leaves: int, nodes: bool) -> int:
    """Counts the stages that fit into `shared` bytes of a block beside what waits for its sibling, or an output tile."""
    parked = {1: 0.5, 2: 0.5, 4: 1.0, 8: 1.0 if nodes else 2.0}[leaves] * 128 * BN * 4
    return int((shared - 1024 - parked) // ((128 + BN) * STAGE_BYTES.value))


def contract(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    leaves: int,
    out_dtype: torch.dtype,
    *,
    group: int = 8,
    nodes: bool = True,
    depth: int | None = None,
    blocks: int | None = None,
    period: int = PERIOD,
) -> torch.Tensor:
    """Computes y = X W^T on the tree: x [M, K] and w [N, K] e4m3, both as TMA reads them, x_scales as `column_scales` returns
    them, w_scales [N / 128, K / 128] with contiguous rows; 1, 2, 4 or 8 equal leaves of whole blocks of 128.

    `group`: rows of tiles in a band; `nodes`: level 2 waits in global memory; `depth`: stages; `blocks` of threads; `period`:
    see kernels.gpu.hopper.pace. None decides a bit."""
    (M, K), N = x.shape, w.shape[0]
    card = card_of(x.device)
    y = torch.empty(M, N, dtype=out_dtype, device=x.device)
    nodes = nodes and leaves == 8
    columns = cdiv(N, BN)
    count = min(blocks or card.multiprocessors, cdiv(M, 128) * columns)
    parked = torch.empty(count * 128 * BN if nodes else 1, dtype=torch.float32, device=x.device)
    run(
        tree_kernel,
        (count,),
        descriptor(x, 64),
        descriptor(w, BN),
        boxes(y, 64, BN) if out_dtype == torch.bfloat16 else y,
        y,
        parked,
        counters(x.device, 2),
        x_scales,
        x_scales.stride(1),
        w_scales,
        w_scales.stride(0),
        M,
        N,
        columns,
        K // leaves,
        BN,
        depth or min(8, stages(card.shared_memory, leaves, nodes)),
        group,
        leaves,
        nodes,
        period,
        num_warps=4,
    )
    return y
