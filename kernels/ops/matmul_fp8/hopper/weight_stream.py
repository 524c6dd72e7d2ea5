"""Few rows to some hundred (decoding, small prefills): y = X W^T of block-scaled FP8, bound by the bytes of w.

Items, producer and what becomes of a tile are those of kernels.ops.matmul.hopper.weight_stream; the leaf is that of leaf.py. A
tile of 64 rows of w is wgmma's M, and lies within one block of them, so that w's scale is one number.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.gpu.card import card_of
from kernels.gpu.hopper.ring import STAGE_BYTES, allocate, descriptor, idle
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early
from kernels.gpu.workspace import counters
from kernels.ops.matmul.hopper.weight_stream import Items, close, cut, near, park_part, place, producer, store_tile
from kernels.ops.matmul_fp8.hopper.leaf import AllScales, leaf, pinned_zeros, scales_at, scales_of


@gluon.jit
def merged(ring, w, scales, d, stage, phase, first, blocks, LEAVES: gl.constexpr):
    """Returns the root of LEAVES leaves of `blocks` blocks, from block `first`. Scales are read when the ring's first stage has
    come: the producer has waited for the kernels that wrote them."""
    mbarrier.wait(ring.full.index(stage), phase)
    sx, sw = scales_of(scales, first, ring.BN, 0)
    v, sx, sw, d, stage, phase = leaf(ring, w, scales, sx, sw, d, stage, phase, first, blocks, 0)
    level0 = v
    level1 = v
    level2 = v
    for j in gl.static_range(1, LEAVES):
        v, sx, sw, d, stage, phase = leaf(ring, w, scales, sx, sw, d, stage, phase, first + j * blocks, blocks, 0)
        v, level0, level1, level2 = close(v, level0, level1, level2, j)
    return v, d, stage, phase


@gluon.jit
def consumer(
    ring,
    w,
    y,
    nodes,
    arrived,
    items,
    all_scales,
    ROW: gl.constexpr,
    LEAVES: gl.constexpr,
    SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Computes with one warpgroup: 64 rows of w, ROW .. ROW + 63 of the tile. WHOLE: some tiles are."""
    stage = 0
    phase = 0
    d = pinned_zeros(ring.BN)
    blocks = items.extent // ring.BK
    last = blocks * LEAVES - 1
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        tile, part = place(item, items, SPLIT)
        n0 = tile // items.columns * (64 * HALVES) + ROW
        m0 = tile % items.columns * ring.BN
        spot = (tile - items.whole) * HALVES + ROW // 64
        mine = nodes + spot.to(gl.int64) * (SPLIT * 64 * ring.BN)
        scales = scales_at(all_scales, m0, n0, last)
        if SPLIT == 1:
            v, d, stage, phase = merged(ring, w, scales, d, stage, phase, 0, blocks, LEAVES)
            store_tile(v, y, items, n0, m0)
        elif not WHOLE:
            first = part * (LEAVES // SPLIT) * blocks
            v, d, stage, phase = merged(ring, w, scales, d, stage, phase, first, blocks, LEAVES // SPLIT)
            park_part(v, y, mine, arrived + spot, items, n0, m0, part, SPLIT)
        elif part < 0:
            v, d, stage, phase = merged(ring, w, scales, d, stage, phase, 0, blocks, LEAVES)
            store_tile(v, y, items, n0, m0)
        else:
            first = part * (LEAVES // SPLIT) * blocks
            v, d, stage, phase = merged(ring, w, scales, d, stage, phase, first, blocks, LEAVES // SPLIT)
            park_part(v, y, mine, arrived + spot, items, n0, m0, part, SPLIT)


@early
@gluon.jit(do_not_specialize=["M", "columns", "items", "whole"])
def stream_kernel(
    w,
    ldw,
    wd,
    xd,
    y,
    nodes,
    arrived,
    M,
    N,
    items,
    whole,
    columns,
    extent,
    x_scales,
    apart,
    w_scales,
    ldw_scales,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    LEAVES: gl.constexpr,
    SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Computes all items of y = X W^T: one warp produces, a warpgroup consumes for each 64 rows of w. The producer waits for
    the kernels before, and everyone waits for what it loads."""
    ring = allocate(wd, xd, BN, STAGES, False, False, HALVES)
    todo = Items(items, whole, columns, M, N, extent)
    all_scales = AllScales(x_scales, apart, w_scales, ldw_scales)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (consumer, (ring, ring.a0, y, nodes, arrived, todo, all_scales, 0, LEAVES, SPLIT, WHOLE, 2)),
                (consumer, (ring, ring.a1, y, nodes, arrived, todo, all_scales, 64, LEAVES, SPLIT, WHOLE, 2)),
                (producer, (ring, wd, xd, todo, LEAVES, SPLIT, 2)),
                (near, (ring, w, ldw, todo, LEAVES, SPLIT, 2)),
                (idle, ()),
                (idle, ()),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (ring, ring.a0, y, nodes, arrived, todo, all_scales, 0, LEAVES, SPLIT, WHOLE, 1)),
                (producer, (ring, wd, xd, todo, LEAVES, SPLIT, 1)),
                (near, (ring, w, ldw, todo, LEAVES, SPLIT, 1)),
                (idle, ()),
                (idle, ()),
            ],
            [1, 1, 1, 1],
            [24, 24, 24, 24],
        )


def least_split(leaves: int, BN: int, rows: int) -> int:
    """Returns the smallest split whose leaves can be merged in registers beside a product: three levels of 64 x 64 with the
    registers of one warpgroup alone, two where two share a block."""
    return max(1, leaves // (4 if BN == 64 and rows == 128 else 8))


def contract(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    leaves: int,
    out_dtype: torch.dtype,
    *,
    BN: int,
    split: int,
    rows: int = 128,
    tail: int = 1,
    blocks: int | None = None,
) -> torch.Tensor:
    """Computes y = X W^T on the tree: x [M, K] and w [N, K] e4m3, both as TMA reads them, x_scales as `column_scales` returns
    them, w_scales [N / 128, K / 128] with contiguous rows; `leaves` equal leaves of whole blocks of 128.

    BN: 16, 32 or 64; rows: 64 or 128; split, tail, blocks: see `kernels.ops.matmul.hopper.weight_stream.cut`."""
    (M, K), N = x.shape, w.shape[0]
    card = card_of(x.device)
    blocks = blocks or card.multiprocessors
    y = torch.empty(M, N, dtype=out_dtype, device=x.device)
    halves = rows // 64
    how = cut(M, N, leaves, BN, rows, max(min(split, leaves), least_split(leaves, BN, rows)), tail, blocks)
    stages = min(12, (card.shared_memory - 2048) // ((rows + BN) * STAGE_BYTES.value))
    run(
        stream_kernel,
        (min(blocks, how.items),),
        w,
        w.stride(0),
        descriptor(w, 64),
        descriptor(x, BN),
        y,
        how.nodes(rows, BN, x.device),
        counters(x.device, how.rest * halves),
        M,
        N,
        how.items,
        how.whole,
        how.columns,
        K // leaves,
        x_scales,
        x_scales.stride(1),
        w_scales,
        w_scales.stride(0),
        BN,
        stages,
        leaves,
        how.split,
        how.whole > 0,
        halves,
        num_warps=4,
    )
    return y
