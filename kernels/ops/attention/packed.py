"""Attention of packed sequences on Hopper (Gluon): the row order of rows.py, with keys and values by TMA.

Persistent. One producer warp fills rings of key and value blocks and never drains; two consumer warpgroups own 64 queries each
and share only the rings, so one computes exponentials while the other multiplies. Tile t of a sequence is its queries 128 t ..;
a warpgroup meets exactly one block that its queries see in part, the last. Heads of a tile are neighbours in the item order, so
blocks that run together have equal work and share keys in L2; a sequence's last tiles, the longest, come first.
"""

import torch
import triton
import triton.language as tl
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

from kernels.ops.attention.rows import tile_of
from kernels.ops.matmul.ring import advance, idle


@triton.jit
def tiles_kernel(starts, tiles, sequences, SEQUENCES: tl.constexpr):
    """tiles [count, 3]: first token of the sequence, one past its last, tile number; (0, 0, 0) where there is no such tile."""
    index = tl.program_id(0)
    s, begin, end, tile = tile_of(starts, index, sequences, SEQUENCES, 128)
    found = s < sequences
    tl.store(tiles + index * 3, tl.where(found, begin, 0))
    tl.store(tiles + index * 3 + 1, tl.where(found, end, 0))
    tl.store(tiles + index * 3 + 2, tl.where(found, tile, 0))


@gluon.jit
def producer(
    qd,
    kd,
    vd,
    tiles,
    q0,
    q1,
    k,
    v,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    items,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        index = item // HEADS
        head = item % HEADS
        column = head // (HEADS // KV_HEADS) * D
        begin = gl.load(tiles + index * 3)
        end = gl.load(tiles + index * 3 + 1)
        tile = gl.load(tiles + index * 3 + 2)
        if end > begin:
            mbarrier.wait(q_empty, q_phase)
            mbarrier.expect(q_full, 128 * D * 2)
            tma.async_copy_global_to_shared(qd, [begin + tile * 128, head * D], q_full, q0)
            tma.async_copy_global_to_shared(qd, [begin + tile * 128 + 64, head * D], q_full, q1)
            q_phase ^= 1
            for i in range(2 * tile + 2):
                row = begin + i * 64
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), 64 * D * 2)
                tma.async_copy_global_to_shared(kd, [row, column], k_full.index(stage), k.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), 64 * D * 2)
                tma.async_copy_global_to_shared(vd, [row, column], v_full.index(stage), v.index(stage))
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def lanes(p):
    """[64, 64] -> [64, 8]: kernels.gpu.arithmetic.fold_to."""
    p = gl.sum(gl.reshape(p, [64, 2, 32]), 1)
    p = gl.sum(gl.reshape(p, [64, 2, 16]), 1)
    return gl.sum(gl.reshape(p, [64, 2, 8]), 1)


@gluon.jit
def one_lane(l):
    """[64, 8] -> [64]."""
    l = gl.sum(gl.reshape(l, [64, 2, 4]), 1)
    l = gl.sum(gl.reshape(l, [64, 2, 2]), 1)
    return gl.sum(l, 1)


@gluon.jit
def log_f32(x):
    """kernels.gpu.arithmetic.log_f32 for normal x."""
    b = x.to(gl.int32, bitcast=True) - 0x3F3504F3
    e = (b >> 23).to(gl.float32)
    m = ((b & 0x007FFFFF) + 0x3F3504F3).to(gl.float32, bitcast=True)
    s = gl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    p = gl.fma(z, z * 0.0 + 1.0 / 11.0, z * 0.0 + 1.0 / 9.0)
    p = gl.fma(z, p, z * 0.0 + 1.0 / 7.0)
    p = gl.fma(z, p, z * 0.0 + 1.0 / 5.0)
    p = gl.fma(z, p, z * 0.0 + 1.0 / 3.0)
    r = gl.fma(2.0 * s, z * p, 2.0 * s)
    y = gl.fma(e, e * 0.0 + 0.693145751953125, gl.fma(e, e * 0.0 + 1.428606765330187045037746429443359375e-06, r))
    return gl.where(x < float("inf"), y, x)


@gluon.jit
def block(
    q,
    k,
    v,
    k_full,
    k_empty,
    v_full,
    v_empty,
    stage,
    phase,
    m,
    l,
    o,
    c,
    PARTIAL: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
):
    """One block of keys for 64 queries. PARTIAL: query r sees keys 0 .. r of the block."""
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(
        q, k.index(stage).permute((1, 0)), gl.zeros([64, 64], gl.float32, S), use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if PARTIAL:
        r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, S)), 1)
        j = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, S)), 0)
        s = gl.where(j <= r, s, float("-inf"))
    top = gl.maximum(m, gl.max(s, 1))
    shrink = gl.exp2((m - top) * c)
    offset = gl.expand_dims(-(top * c), 1)
    s, offset = gl.broadcast(s, offset)
    p = gl.exp2(gl.fma(s, gl.full([64, 64], 0.0, gl.float32, S) + c, offset))
    L: gl.constexpr = l.type.layout
    by_lane = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, L)), 1)
    l, by_lane = gl.broadcast(l, by_lane)
    l = gl.fma(l, by_lane, gl.convert_layout(lanes(p), L))
    o = o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O)), 1)
    p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(v_full.index(stage), phase)
    o = warpgroup_mma(p16, v.index(stage), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    stage, phase = advance(stage, phase, STAGES)
    return top, l, o, stage, phase


@gluon.jit
def merge(M, L, Y, m, l, o, c, O: gl.constexpr):
    top = gl.maximum(M, m)
    left = gl.exp2((M - top) * c)
    right = gl.exp2((m - top) * c)
    by_row = gl.expand_dims(gl.convert_layout(left, gl.SliceLayout(1, O)), 1)
    Y, by_row = gl.broadcast(Y, by_row)
    Y = gl.fma(Y, by_row, o * gl.expand_dims(gl.convert_layout(right, gl.SliceLayout(1, O)), 1))
    return top, gl.fma(L, left, l * right), Y


@gluon.jit
def consumer(
    out,
    lse,
    tiles,
    q,
    k,
    v,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    items,
    c,
    HALF: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
):
    """One warpgroup: queries 64 HALF .. of every tile of this block. SPLIT: key blocks of a split."""
    R: gl.constexpr = gl.SliceLayout(1, S)
    stage = 0
    phase = 0
    q_phase = 0
    no_lanes = lanes(gl.zeros([64, 64], gl.float32, S))
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        index = item // HEADS
        head = item % HEADS
        begin = gl.load(tiles + index * 3)
        end = gl.load(tiles + index * 3 + 1)
        tile = gl.load(tiles + index * 3 + 2)
        if end > begin:
            mbarrier.wait(q_full, q_phase)
            q_phase ^= 1
            seen = 2 * tile + HALF  # blocks that every query of this warpgroup sees whole
            M = gl.full([64], float("-inf"), gl.float32, R)
            L = gl.zeros([64], gl.float32, R)
            Y = gl.zeros([64, D], gl.float32, O)
            for split in range(0, seen // SPLIT):
                m = gl.full([64], float("-inf"), gl.float32, R)
                l = no_lanes
                o = gl.zeros([64, D], gl.float32, O)
                for i in range(SPLIT):
                    m, l, o, stage, phase = block(
                        q, k, v, k_full, k_empty, v_full, v_empty, stage, phase, m, l, o, c, False, D, STAGES, S, O
                    )
                M, L, Y = merge(M, L, Y, m, gl.convert_layout(one_lane(l), R), o, c, O)
            m = gl.full([64], float("-inf"), gl.float32, R)
            l = no_lanes
            o = gl.zeros([64, D], gl.float32, O)
            for i in range(seen % SPLIT):
                m, l, o, stage, phase = block(
                    q, k, v, k_full, k_empty, v_full, v_empty, stage, phase, m, l, o, c, False, D, STAGES, S, O
                )
            m, l, o, stage, phase = block(
                q, k, v, k_full, k_empty, v_full, v_empty, stage, phase, m, l, o, c, True, D, STAGES, S, O
            )
            mbarrier.arrive(q_empty, count=1)
            if HALF == 0:  # the block that only the other half sees
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(v_empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
            M, L, Y = merge(M, L, Y, m, gl.convert_layout(one_lane(l), R), o, c, O)
            inverse = gl.div_rn(L * 0.0 + 1.0, L)
            y = Y * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O)), 1) + 0.0
            token = begin + tile * 128 + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
            d = gl.arange(0, D, gl.SliceLayout(0, O))
            at = gl.expand_dims((token.to(gl.int64) * HEADS + head) * D, 1) + gl.expand_dims(d, 0)
            gl.store(out + at, y.to(gl.bfloat16), mask=gl.expand_dims(token < end, 1) & gl.expand_dims(d < D, 0))
            row = begin + tile * 128 + HALF * 64 + gl.arange(0, 64, R)
            e = gl.fma(log_f32(L), L * 0.0 + 1.44269502162933349609375, M * c)
            gl.store(lse + row.to(gl.int64) * HEADS + head, e, mask=row < end)


@gluon.jit(do_not_specialize=["items"])
def packed_kernel(
    qd,
    kd,
    vd,
    out,
    lse,
    tiles,
    items,
    c,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
):
    q0 = gl.allocate_shared_memory(gl.bfloat16, [64, D], qd.layout)
    q1 = gl.allocate_shared_memory(gl.bfloat16, [64, D], qd.layout)
    k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, D], kd.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, D], vd.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    out,
                    lse,
                    tiles,
                    q0,
                    k,
                    v,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    items,
                    c,
                    0,
                    HEADS,
                    D,
                    SPLIT,
                    STAGES,
                    S,
                    O,
                ),
            ),
            (
                consumer,
                (
                    out,
                    lse,
                    tiles,
                    q1,
                    k,
                    v,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    items,
                    c,
                    1,
                    HEADS,
                    D,
                    SPLIT,
                    STAGES,
                    S,
                    O,
                ),
            ),
            (
                producer,
                (
                    qd,
                    kd,
                    vd,
                    tiles,
                    q0,
                    q1,
                    k,
                    v,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    items,
                    HEADS,
                    KV_HEADS,
                    D,
                    STAGES,
                ),
            ),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def launch(q, keys, values, pages, out, lse, c, key_split, *, blocks=132, warmup=False):  # type: ignore[no-untyped-def]
    (T, heads, D), kv_heads = q.shape, keys.shape[1]
    sequences = pages.starts.numel() - 1
    count = triton.cdiv(T, 128) + sequences
    tiles = torch.empty(count, 3, dtype=torch.int32, device=q.device)
    if not warmup:
        tiles_kernel[(count,)](pages.starts, tiles, sequences, triton.next_power_of_2(sequences + 1), num_warps=1)
    box = gl.NVMMASharedLayout.get_default_for([64, D], gl.bfloat16)
    flat = [TensorDescriptor(t, [T, t.shape[1] * D], [t.stride(0), 1], [64, D], box) for t in (q, keys, values)]
    s, o = (gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16]) for n in (64, D))
    grid = (min(blocks, count * heads),)
    run = (lambda *a, **kw: packed_kernel.warmup(*a, grid=grid, **kw)) if warmup else packed_kernel[grid]
    stages = min(6, (232448 - 2048 - 128 * D * 2) // (128 * D * 2))
    return run(
        *flat,
        out,
        lse,
        tiles,
        count * heads,
        c,
        heads,
        kv_heads,
        D,
        key_split // 64,
        stages,
        s,
        o,
        num_warps=4,
        enable_fp_fusion=False,
    )
