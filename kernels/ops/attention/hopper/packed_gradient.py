"""Gradient of packed attention on Hopper (Gluon), head_dim 64 and 128: one kernel, five products.

A block owns 128 keys of a kv head. Two consumer warpgroups of 64 keys hold dk and dv in registers and walk the queries of the
sequence from its last block of 64 down to the diagonal, in each block the heads of the group in ascending order:

    s = k q';  p = 2^(s c - lse);  dp = v d_out';  d_s = p (dp - delta);  dv += p d_out;  dk += d_s q;  dq += d_s' k

p and d_s are bf16 where they enter a tensor core, and zero where a key may not be seen. dk and dv are one chain in that order.
dq of a query is a sum over tiles of 128 keys in ascending order, each a tensor-core chain over its keys from zero. Tiles are
cut from the start of a sequence, and rows of a tile past its end are zeroed: a sequence cannot see its neighbours.

The sum dq lies in `park` (float32, in L2 while in use). `turns` counts, for each block of queries and head, the tiles that
have added: tile j adds when the count says j. Tile 0 stores; the tile on the diagonal, the last, adds in registers, scales and
rounds. So no order depends on time. Tiles are handed out in ascending order, hence the one that another waits for is always
running or done, however many blocks the GPU runs at once. Two warps wait for turns and publish them, so that consumers never
wait for L2; a part of dq is added while the product of dk runs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.gpu.arithmetic import fold
from kernels.gpu.card import card_of
from kernels.gpu.dialect import load_boxes, reinterpret, thread_barrier
from kernels.gpu.hopper.ring import accumulator, advance, flat, idle, tile_of
from kernels.gpu.launch import box_layout, boxes, cdiv, head_boxes, next_power_of_2
from kernels.gpu.launch import launch as run
from kernels.ops.attention.hopper.tiles import allocate_board, barriers, blank, post, read

HEAD_DIMS = (64, 128)


@triton.jit
def tiles_kernel(starts, queue, sequences, SEQUENCES: tl.constexpr):
    """Writes the queue of tiles: tiles handed out (0), tiles, two unused words, then of each tile: first token of its
    sequence, one past the last, number in the sequence, the sequence's first block. Program s lists the tiles of sequence s,
    ascending; longer first."""
    s = tl.program_id(0)
    i = tl.arange(0, SEQUENCES)
    first = tl.load(starts + i, mask=i < sequences, other=0).to(tl.int32)
    last = tl.load(starts + i + 1, mask=i < sequences, other=0).to(tl.int32)
    count = (last - first + 127) // 128
    begin = tl.load(starts + s).to(tl.int32)
    end = tl.load(starts + s + 1).to(tl.int32)
    mine = (end - begin + 127) // 128
    before = (count > mine) | ((count == mine) & (i < s))
    at = tl.sum(tl.where(before, count, 0), 0)
    for t in range(0, mine, 32):
        tile = t + tl.arange(0, 32)
        to = queue + 4 + (at + tile) * 4
        tl.store(to, begin, mask=tile < mine)
        tl.store(to + 1, end, mask=tile < mine)
        tl.store(to + 2, tile, mask=tile < mine)
        tl.store(to + 3, begin // 64 + s, mask=tile < mine)
    if s == 0:
        tl.store(queue, 0)
        tl.store(queue + 1, tl.sum(count, 0))


@triton.jit
def rows_kernel(
    out, d_out, lse, starts, rows, turns, sequences, HEADS: tl.constexpr, D: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Writes rows [blocks heads, 128]: of 64 queries -lse, then delta = out . d_out; past a sequence's end -inf (so p = 0)
    and 0."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    i = tl.arange(0, SEQUENCES)
    base = tl.load(starts + i, mask=i < sequences, other=0).to(tl.int32) // 64 + i
    s = tl.sum(((base <= block) & (i < sequences)).to(tl.int32), 0) - 1
    begin = tl.load(starts + s).to(tl.int32)
    end = tl.load(starts + s + 1).to(tl.int32)
    token = begin + (block - begin // 64 - s) * 64 + tl.arange(0, 64)
    there = token < end
    d = tl.arange(0, D)
    at = token.to(tl.int64) * HEADS + head
    a = tl.load(out + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    b = tl.load(d_out + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    e = tl.load(lse + at, mask=there, other=float("inf"))
    to = rows + (block.to(tl.int64) * HEADS + head) * 128 + tl.arange(0, 64)
    tl.store(to, -e)
    tl.store(to + 64, fold(a * b))
    tl.store(turns + block * HEADS + head, 0)


@gluon.jit
def producer(
    qd,
    kd,
    vd,
    gd,
    rd,
    queue,
    tiles,
    arrived,
    done,
    board,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
):
    """Takes tiles from the queue, announces them on the board, and fills keys, values and the ring of queries by TMA."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    k, v, q, g, e, _ = tiles
    kv_full, kv_empty, q_full, g_full = arrived
    stage = 0
    phase = 1
    kv_phase = 1
    slot = 0
    slot_phase = 1
    items = gl.load(queue + 1) * KV_HEADS
    item = gl.atomic_add(queue, 1)
    while item < items:
        at = queue + 4 + item // KV_HEADS * 4
        kv = item % KV_HEADS
        begin = gl.load(at)
        end = gl.load(at + 1)
        tile = gl.load(at + 2)
        base = gl.load(at + 3)
        slot, slot_phase = post(board, slot, slot_phase, begin, end, tile, base, kv)
        mbarrier.wait(kv_empty, kv_phase)
        kv_phase ^= 1
        mbarrier.expect(kv_full, 128 * D * 4)
        load_boxes(kd, [begin + tile * 128, kv * D], kv_full, k.index(0))
        load_boxes(vd, [begin + tile * 128, kv * D], kv_full, v.index(0))
        blocks = (end - begin + 63) // 64
        for i in range((blocks - 2 * tile) * GROUP):
            block = blocks - 1 - i // GROUP
            head = kv * GROUP + i % GROUP
            mbarrier.wait(done.index(stage), phase)
            bar = q_full.index(stage)
            mbarrier.expect(bar, 64 * D * 2 + 512)
            load_boxes(qd, [begin + block * 64, head * D], bar, q.index(stage))
            load_boxes(rd, [(base + block) * HEADS + head, 0], bar, e.index(stage))
            bar = g_full.index(stage)
            mbarrier.expect(bar, 64 * D * 2)
            load_boxes(gd, [begin + block * 64, head * D], bar, g.index(stage))
            stage, phase = advance(stage, phase, 2)
        item = gl.atomic_add(queue, 1)
    post(board, slot, slot_phase, 0, 0, 0, 0, 0)


@gluon.jit
def watcher(turns, turn, published, board, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Waits for the turn of each step."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    slot = 0
    slot_phase = 0
    at = 0
    phase = 1
    begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 1)
    while end > begin:
        blocks = (end - begin + 63) // 64
        for i in range((blocks - 2 * tile) * GROUP):
            count = turns + (base + blocks - 1 - i // GROUP) * HEADS + kv * GROUP + i % GROUP
            mbarrier.wait(published.index(at), phase)
            if tile > 0:
                while gl.atomic_add(count, 0, sem="acquire", scope="gpu") < tile:
                    pass
            mbarrier.arrive(turn.index(at), count=1)
            at, phase = advance(at, phase, 2)
        begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 1)


@gluon.jit
def publisher(turns, done, published, board, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Gives the turn to the next tile when both warpgroups have added."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    slot = 0
    slot_phase = 0
    at = 0
    phase = 0
    begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 1)
    while end > begin:
        blocks = (end - begin + 63) // 64
        for i in range((blocks - 2 * tile) * GROUP):
            count = turns + (base + blocks - 1 - i // GROUP) * HEADS + kv * GROUP + i % GROUP
            mbarrier.wait(done.index(at), phase)
            gl.atomic_add(count, 1, sem="release", scope="gpu")
            mbarrier.arrive(published.index(at), count=1)
            at, phase = advance(at, phase, 2)
        begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 1)


@gluon.jit
def add(
    d_q,
    park,
    turn,
    phase,
    f,
    begin,
    end,
    tile,
    base,
    block,
    head,
    scale,
    HALF: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    Q: gl.constexpr,
):
    """Adds a part of dq when its turn has come."""
    W: gl.constexpr = D // 2
    to = park + (((base + block) * HEADS + head) * 2 + HALF).to(gl.int64) * (64 * W)
    F: gl.constexpr = f.type.layout
    to = to + gl.arange(0, 64 * W, F)
    mbarrier.wait(turn, phase)
    if block // 2 > tile:
        if tile == 0:
            gl.store(to, f)
        else:
            gl.atomic_add(to, f, sem="relaxed", scope="gpu")
    else:
        if tile > 0:
            f = gl.load(to, cache_modifier=".cg") + f
        y = tile_of(f, W, Q) * scale
        token = begin + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, Q))
        cols = gl.arange(0, W, gl.SliceLayout(0, Q))
        where = gl.expand_dims((token.to(gl.int64) * HEADS + head) * D + W * HALF, 1) + gl.expand_dims(cols, 0)
        there = gl.expand_dims(token < end, 1) & gl.expand_dims(cols < W, 0)
        gl.store(d_q + where, y.to(gl.bfloat16), mask=there)


@gluon.jit
def numbers(row, FIRST: gl.constexpr, S: gl.constexpr):
    """Loads 64 of the 128 numbers of a row of `rows_kernel`, above the columns of an accumulator."""
    row = reinterpret(row, gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.expand_dims(row.slice(FIRST, 64).load(gl.SliceLayout(0, S)), 0)


@gluon.jit
def consumer(
    sums,
    tiles,
    arrived,
    done,
    full,
    full_other,
    turn,
    board,
    scale,
    c,
    HALF: gl.constexpr,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    O: gl.constexpr,
):
    """Computes with one warpgroup: keys 64 HALF .. of every tile, and columns D / 2 HALF .. of dq. full, full_other: d_s of
    this one and of the other stands in shared memory."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    W: gl.constexpr = D // 2
    d_q, d_k, d_v, park = sums
    k, v, q, g, rows, ds = tiles
    kv_full, kv_empty, q_full, g_full = arrived
    stage = 0
    phase = 0
    kv_phase = 0
    slot = 0
    slot_phase = 0
    begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 4)
    while end > begin:
        mbarrier.wait(kv_full, kv_phase)
        kv_phase ^= 1
        valid = end - begin - tile * 128 - 64 * HALF
        if valid < 64:
            blank(k.index(0).slice(64 * HALF, 64), valid, 64)
            blank(v.index(0).slice(64 * HALF, 64), valid, 64)
        blocks = (end - begin + 63) // 64
        dk = gl.zeros([64, D], gl.float32, O)
        dv = gl.zeros([64, D], gl.float32, O)
        for i in range((blocks - 2 * tile) * GROUP):
            block = blocks - 1 - i // GROUP
            mbarrier.wait(q_full.index(stage), phase)
            left = end - begin - block * 64
            if left < 64:
                blank(q.index(stage), left, 64)
            # 0, which ptxas cannot know: it would keep the 24 descriptors of k and v in registers that are not there
            zero = left >> 31
            s = warpgroup_mma(
                k.index(zero).slice(64 * HALF, 64),
                q.index(stage).permute((1, 0)),
                gl.zeros([64, 64], gl.float32, S),
                use_acc=False,
                is_async=True,
            )
            mbarrier.wait(g_full.index(stage), phase)
            if left < 64:
                blank(g.index(stage), left, 64)
            dp = warpgroup_mma(
                v.index(zero).slice(64 * HALF, 64),
                g.index(stage).permute((1, 0)),
                gl.zeros([64, 64], gl.float32, S),
                use_acc=False,
                is_async=True,
            )
            e = numbers(rows.index(stage), 0, S)
            s = warpgroup_mma_wait(1, deps=(s,))
            s, e = gl.broadcast(s, e)
            p = gl.exp2(gl.fma(s, gl.full([64, 64], 0.0, gl.float32, S) + c, e))
            # key 128 tile + 64 HALF + r sees query 64 block + c
            edge = 64 * block - 128 * tile - 64 * HALF
            if edge <= 0:
                r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, S)), 1)
                col = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, S)), 0)
                p = gl.where(r <= col + edge, p, 0.0)
            p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, O, 2))
            delta = numbers(rows.index(stage), 64, S)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            dv = warpgroup_mma(p16, g.index(stage), dv, is_async=True)
            d = p * (dp - delta)
            if edge <= 0:
                r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, S)), 1)
                col = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, S)), 0)
                d = gl.where(r <= col + edge, d, 0.0)
            d16 = d.to(gl.bfloat16)
            mbarrier.wait(done.index(stage), phase ^ 1)
            ds.index(stage).slice(64 * HALF, 64).store(d16)
            fence_async_shared()
            thread_barrier()
            mbarrier.arrive(full.index(stage), count=1)
            mbarrier.wait(full_other.index(stage), phase)
            dq = warpgroup_mma(
                ds.index(stage).permute((1, 0)),
                k.index(zero).slice(W * HALF, W, dim=1),
                gl.zeros([64, W], gl.float32, Q),
                use_acc=False,
                is_async=True,
            )
            dk = warpgroup_mma(gl.convert_layout(d16, gl.DotOperandLayout(0, O, 2)), q.index(stage), dk, is_async=True)
            dq = warpgroup_mma_wait(1, deps=(dq,))
            head = kv * GROUP + i % GROUP
            add(
                d_q,
                park,
                turn.index(stage),
                phase,
                flat(dq),
                begin,
                end,
                tile,
                base,
                block,
                head,
                scale,
                HALF,
                HEADS,
                D,
                Q,
            )
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            thread_barrier()
            mbarrier.arrive(done.index(stage), count=1)
            stage, phase = advance(stage, phase, 2)
        mbarrier.arrive(kv_empty, count=1)
        token = begin + tile * 128 + 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, O))
        cols = gl.arange(0, D, gl.SliceLayout(0, O))
        where = gl.expand_dims((token.to(gl.int64) * KV_HEADS + kv) * D, 1) + gl.expand_dims(cols, 0)
        there = gl.expand_dims(token < end, 1) & gl.expand_dims(cols < D, 0)
        gl.store(d_k + where, (dk * scale).to(gl.bfloat16), mask=there)
        gl.store(d_v + where, dv.to(gl.bfloat16), mask=there)
        begin, end, tile, base, kv, slot, slot_phase = read(board, slot, slot_phase, 4)


@gluon.jit
def gradient_kernel(
    qd,
    kd,
    vd,
    gd,
    rd,
    d_q,
    d_k,
    d_v,
    park,
    turns,
    queue,
    scale,
    c,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    S: gl.constexpr,
    Q: gl.constexpr,
    O: gl.constexpr,
    X: gl.constexpr,
):
    """Computes d_q, d_k and d_v of packed sequences: one warp produces, two warpgroups consume."""
    k = gl.allocate_shared_memory(gl.bfloat16, [1, 128, D], kd.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [1, 128, D], vd.layout)
    q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], qd.layout)
    g = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], gd.layout)
    e = gl.allocate_shared_memory(gl.float32, [2, 1, 128], rd.layout)
    ds = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 64], X)
    # arrays of their own: between two uses of one, Triton makes the threads of a warpgroup wait for each other
    arrived = (barriers(1, 1).index(0), barriers(1, 2).index(0), barriers(2, 1), barriers(2, 1))
    done = barriers(2, 2)  # of a step: its q, d_out and d_s may be overwritten, and its part of dq is added
    full0 = barriers(2, 1)
    full1 = barriers(2, 1)
    turn = barriers(2, 1)
    published = barriers(2, 1)
    tiles = (k, v, q, g, e, ds)
    sums = (d_q, d_k, d_v, park)
    board = allocate_board(4)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (sums, tiles, arrived, done, full0, full1, turn, board, scale, c, 0, HEADS, KV_HEADS, D, S, Q, O),
            ),
            (
                consumer,
                (sums, tiles, arrived, done, full1, full0, turn, board, scale, c, 1, HEADS, KV_HEADS, D, S, Q, O),
            ),
            (producer, (qd, kd, vd, gd, rd, queue, tiles, arrived, done, board, HEADS, KV_HEADS, D)),
            (watcher, (turns, turn, published, board, HEADS, KV_HEADS)),
            (publisher, (turns, done, published, board, HEADS, KV_HEADS)),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


@cache
def _layouts(D: int) -> tuple:
    return accumulator(64), accumulator(D // 2), accumulator(D), box_layout(128, 64)


def launch(q, keys, values, out, lse, d_out, starts, scale, c, *, blocks=None):  # type: ignore[no-untyped-def]
    """Returns (d_q [T, heads, D], d_k, d_v [T, kv_heads, D]) of q, keys, values, out, d_out in bf16, with heads and D
    contiguous and reachable by TMA, and lse [T, heads], base 2. `blocks` is free: no bit depends on it."""
    (T, heads, D), kv_heads = q.shape, keys.shape[1]
    sequences = starts.numel() - 1
    count, tiles = T // 64 + sequences, cdiv(T, 128) + sequences
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=q.device)  # noqa: E731
    rows = new(count * heads, 128, dtype=torch.float32)
    park = new(count, heads, 64, D, dtype=torch.float32)
    turns = new(count, heads, dtype=torch.int32)
    queue = new(4 + tiles * 4, dtype=torch.int32)
    d_q = q.new_empty(T, heads, D)
    d_k, d_v = keys.new_empty(T, kv_heads, D), values.new_empty(T, kv_heads, D)
    power = next_power_of_2(sequences + 1)
    run(tiles_kernel, (sequences,), starts, queue, sequences, power, num_warps=1)
    of_rows = (out, d_out, lse, starts, rows, turns, sequences, heads, D, power)
    run(rows_kernel, (heads, count), *of_rows, num_warps=8, enable_fp_fusion=False)
    grid = (min(blocks or card_of(q.device).multiprocessors, tiles * kv_heads),)
    run(
        gradient_kernel,
        grid,
        head_boxes(q, 64),
        head_boxes(keys, 128),
        head_boxes(values, 128),
        head_boxes(d_out, 64),
        boxes(rows, 1, 128),
        d_q,
        d_k,
        d_v,
        park,
        turns,
        queue,
        scale,
        c,
        heads,
        kv_heads,
        D,
        *_layouts(D),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return d_q, d_k, d_v
