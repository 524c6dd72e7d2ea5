"""Attention of many queries of a sequence on Hopper (Gluon): the row order of rows.py, with keys and values by TMA, from the
rows of the same tokens (packed) or from pages.

Persistent. Tile t of a sequence are its queries at positions 128 t .. 128 t + 127, of one head; where a chunk begins inside a
tile, the rows before it are computed of what lies there, and not stored. One producer warp takes the next tile from a
counter, announces it and fills rings of key and value blocks; it never drains. Two consumer warpgroups own 64 queries each.
In a warpgroup the scores of block i and the product of block i - 1 with its values are on the tensor core together, and the
exponentials of block i run while that product does (FlashAttention-3, Shah et al. 2024, section 3.2). The block that queries
see in part is the tile's last; the first 64 queries see nothing of its second half and skip it, which changes no bit, because
its p are zeros. What earlier splits left waits in shared memory.

Sequences with more tiles come first, and the last tiles of a sequence, the longest, before its first; heads of a tile are
neighbours, so blocks that run together have equal work and share keys in L2. Which block computes a tile changes no bit.
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

from kernels.gpu.card import card_of
from kernels.gpu.dialect import load_boxes, reinterpret
from kernels.gpu.hopper.ring import accumulator, advance, idle, park_layout
from kernels.gpu.launch import box_layout, cdiv, head_boxes, next_power_of_2
from kernels.gpu.launch import launch as run
from kernels.ops.attention import Pages
from kernels.ops.attention.hopper.tiles import allocate_board, barriers, blank, post, read


@triton.jit
def tiles_of(begin, end, position, there, PAGED: tl.constexpr):
    """Returns (position of the first token, first tile, one past the last) of the tokens begin .. end of a sequence."""
    at = begin * 0
    if PAGED:
        at = tl.load(position + begin, mask=there & (begin < end), other=0)
    return at, at // 128, tl.where(begin < end, (at + end - begin + 127) // 128, at // 128)


@triton.jit
def tiles_kernel(starts, position, queue, sequences, SEQUENCES: tl.constexpr, PAGED: tl.constexpr):
    """Writes the queue of tiles: tiles handed out so far (0), tiles, two unused words, then of each tile: the row that its
    sequence's position 0 has or would have, its first token, one past its last, the tile's number in the sequence, and the
    sequence. Program s lists the tiles of sequence s."""
    s = tl.program_id(0)
    i = tl.arange(0, SEQUENCES)
    there = i < sequences
    first = tl.load(starts + i, mask=there, other=0).to(tl.int32)
    last = tl.load(starts + i + 1, mask=there, other=0).to(tl.int32)
    _, low, high = tiles_of(first, last, position, there, PAGED)
    begin = tl.load(starts + s).to(tl.int32)
    end = tl.load(starts + s + 1).to(tl.int32)
    at, mine_low, mine_high = tiles_of(begin, end, position, s < sequences, PAGED)
    before = (high > mine_high) | ((high == mine_high) & (i < s))
    to = queue + 4 + tl.sum(tl.where(before, high - low, 0), 0) * 5
    for t in range(mine_low, mine_high, 32):
        tile = t + tl.arange(0, 32)
        inside = tile < mine_high
        entry = to + (mine_high - 1 - tile) * 5
        tl.store(entry, begin - at, mask=inside)
        tl.store(entry + 1, begin, mask=inside)
        tl.store(entry + 2, end, mask=inside)
        tl.store(entry + 3, tile, mask=inside)
        tl.store(entry + 4, s, mask=inside)
    if s == 0:
        tl.store(queue, 0)
        tl.store(queue + 1, tl.sum(high - low, 0))


@gluon.jit
def fetch(d, boxes, bar, stage, block, base, column, table, last_page, D: gl.constexpr, PAGE: gl.constexpr):
    """Copies one block of 128 keys or values into a stage: a box, or, from pages, one for each page (or its part in the
    block) and 64 columns. A page past the sequence's last is not in the table: the last is read again, and blanked."""
    if PAGE == 0:
        load_boxes(d, [base + block * 128, column], bar, boxes.index(stage))
    else:
        BOX: gl.constexpr = min(PAGE, 128)
        BOXES: gl.constexpr = 128 // BOX
        PANELS: gl.constexpr = D // 64
        for j in gl.static_range(BOXES):
            at = block * 128 + j * BOX
            row = gl.load(table + gl.minimum(at // PAGE, last_page)) * PAGE + at % PAGE
            for p in gl.static_range(PANELS):
                to = boxes.index((stage * PANELS + p) * BOXES + j)
                load_boxes(d, [row, column + 64 * p], bar, to)


@gluon.jit
def producer(
    qd,
    kd,
    vd,
    queue,
    table,
    width,
    queries,
    keys,
    values,
    board,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Takes tiles from the queue, announces them on the board, and fills the rings of queries, keys and values by TMA."""
    q0, q1, q_full, q_empty = queries
    k, k_full, k_empty = keys
    v, v_full, v_empty = values
    if PAGE > 0:  # a box of `fetch` for each index
        BOX: gl.constexpr = min(PAGE, 128)
        LAYOUT: gl.constexpr = kd.layout
        k = reinterpret(k, gl.bfloat16, [STAGES * (D // 64) * (128 // BOX), BOX, 64], LAYOUT)
        v = reinterpret(v, gl.bfloat16, [STAGES * (D // 64) * (128 // BOX), BOX, 64], LAYOUT)
    stage = 0
    phase = 1
    q_phase = 1
    slot = 0
    slot_phase = 1
    items = gl.load(queue + 1) * HEADS
    item = gl.program_id(0)
    while item < items:
        at = queue + 4 + item // HEADS * 5
        head = item % HEADS
        column = head // (HEADS // KV_HEADS) * D
        base = gl.load(at)
        begin = gl.load(at + 1)
        end = gl.load(at + 2)
        tile = gl.load(at + 3)
        slot, slot_phase = post(board, slot, slot_phase, base, begin, end, tile, head)
        mine = table
        last_page = 0
        if PAGE > 0:
            mine = table + gl.load(at + 4).to(gl.int64) * width
            last_page = (end - base - 1) // PAGE
        mbarrier.wait(q_empty, q_phase)
        mbarrier.expect(q_full, 128 * D * 2)
        load_boxes(qd, [base + tile * 128, head * D], q_full, q0)
        load_boxes(qd, [base + tile * 128 + 64, head * D], q_full, q1)
        q_phase ^= 1
        for i in range(tile + 1):
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), 128 * D * 2)
            fetch(kd, k, k_full.index(stage), stage, i, base, column, mine, last_page, D, PAGE)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), 128 * D * 2)
            fetch(vd, v, v_full.index(stage), stage, i, base, column, mine, last_page, D, PAGE)
            stage, phase = advance(stage, phase, STAGES)
        item = gl.num_programs(0) + gl.atomic_add(queue, 1)
    post(board, slot, slot_phase, 0, 0, 0, 0, 0)


@gluon.jit
def lanes(p):
    """Folds [64, keys] -> [64, 8]: kernels.gpu.arithmetic.fold_to."""
    if p.shape[1] == 128:
        p = gl.sum(gl.reshape(p, [64, 2, 64]), 1)
    p = gl.sum(gl.reshape(p, [64, 2, 32]), 1)
    p = gl.sum(gl.reshape(p, [64, 2, 16]), 1)
    return gl.sum(gl.reshape(p, [64, 2, 8]), 1)


@gluon.jit
def one_lane(l):
    """Folds [64, 8] -> [64]."""
    l = gl.sum(gl.reshape(l, [64, 2, 4]), 1)
    l = gl.sum(gl.reshape(l, [64, 2, 2]), 1)
    return gl.sum(l, 1)


@gluon.jit
def log_f32(x):
    """Computes kernels.gpu.arithmetic.log_f32 for normal x."""
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
def by_row(x, O: gl.constexpr):
    """Lays a number for each row along the rows of layout O, as a column."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, O)), 1)


@gluon.jit
def exponentials(s, m, l, c, S: gl.constexpr):
    """Returns (top, l, shrink, p) after a block with scores s."""
    m = gl.convert_layout(m, gl.SliceLayout(1, S))
    top = gl.maximum(m, gl.max(s, 1))
    shrink = gl.exp2((m - top) * c)
    s, offset = gl.broadcast(s, gl.expand_dims(-(top * c), 1))
    p = gl.exp2(gl.fma(s, gl.full(s.shape, 0.0, gl.float32, S) + c, offset))
    sums = lanes(p)
    LANES: gl.constexpr = sums.type.layout
    l, by_lane = gl.broadcast(gl.convert_layout(l, LANES), by_row(shrink, LANES))
    return top, gl.fma(l, by_lane, sums), shrink, p


@gluon.jit
def merge(M, L, park, m, l, o, c, O: gl.constexpr):
    """Returns (M, L) and the sum parked in shared memory, and the split (m, l, o) after them. -> (M, L, sum)."""
    top = gl.maximum(M, m)
    left = gl.exp2((M - top) * c)
    right = gl.exp2((m - top) * c)
    Y, scale = gl.broadcast(park.index(0).load(O), by_row(left, O))
    return top, gl.fma(L, left, l * right), gl.fma(Y, scale, o * by_row(right, O))


@gluon.jit
def part(tile, rows: gl.constexpr):
    """Returns the first `rows` rows of a block of keys or values."""
    if rows < 128:
        tile = tile.slice(0, rows)
    return tile


@gluon.jit
def step(
    q,
    keys,
    values,
    park,
    stage,
    phase,
    v_stage,
    v_phase,
    i,
    m,
    l,
    o,
    M,
    L,
    p16,
    c,
    FIRST: gl.constexpr,
    LAST: gl.constexpr,
    HALF: gl.constexpr,
    WIDTH: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
):
    """Scores and exponentials of key block i, and the product p v of block i - 1 (unless FIRST). LAST: the block that the
    tile's queries see in part. WIDTH: how many of its keys this warpgroup needs."""
    k, k_full, k_empty = keys
    v, v_full, v_empty = values
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(
        q,
        part(k.index(stage), WIDTH).permute((1, 0)),
        gl.zeros([64, WIDTH], gl.float32, S),
        use_acc=False,
        is_async=True,
    )
    if not FIRST:
        mbarrier.wait(v_full.index(v_stage), v_phase)
        o = warpgroup_mma(p16, v.index(v_stage), o, use_acc=(i - 1) % SPLIT != 0, is_async=True)
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    stage, phase = advance(stage, phase, STAGES)
    if LAST:
        r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, S)), 1)
        j = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, S)), 0)
        s = gl.where(j <= r + 64 * HALF, s, float("-inf"))
    m_old = m
    l_old = l
    if not FIRST:
        fresh = i % SPLIT == 0  # the first block of a split
        m = gl.where(fresh, float("-inf"), m)
    m, l, shrink, p = exponentials(s, m, l, c, S)
    m = gl.convert_layout(m, m_old.type.layout)
    l = gl.convert_layout(l, l_old.type.layout)
    if not FIRST:
        # This wait passes at once. ptxas would move the next one up, before the exponentials, but not over a branch.
        mbarrier.wait(v_full.index(v_stage), v_phase)
        o, p, l, shrink = warpgroup_mma_wait(0, deps=(o, p, l, shrink))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = advance(v_stage, v_phase, STAGES)
        if fresh:  # o starts again by use_acc
            l_split = gl.convert_layout(one_lane(l_old), M.type.layout)
            if i == SPLIT:
                park.index(0).store(o)
                M = m_old
                L = l_split
            else:
                M, L, Y = merge(M, L, park, m_old, l_split, o, c, O)
                park.index(0).store(Y)
        else:
            o = o * by_row(shrink, O)
    p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, O, 2))
    return stage, phase, v_stage, v_phase, m, l, o, M, L, p16


@gluon.jit
def consumer(
    out,
    lse,
    q,
    q_full,
    q_empty,
    keys,
    values,
    blanked,
    board,
    park,
    c,
    HALF: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    PAGED: gl.constexpr,
    WIDTH: gl.constexpr,
    LS: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
):
    """Computes with one warpgroup: queries 64 HALF .. of every tile of this block. SPLIT: key blocks of a split. WIDTH: keys
    of the last block that these queries see, with scores in layout LS."""
    R: gl.constexpr = gl.SliceLayout(1, S)
    v, v_full, v_empty = values
    stage = 0
    phase = 0
    v_stage = 0
    v_phase = 0
    q_phase = 0
    blank_phase = 0
    no_lanes = lanes(gl.zeros([64, 128], gl.float32, S))
    no_p = gl.zeros([64, 128], gl.bfloat16, gl.DotOperandLayout(0, O, 2))
    base, begin, end, tile, head, slot, slot_phase = read(board, gl.to_tensor(0), gl.to_tensor(0), 4)
    while end > 0:
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        m = gl.full([64], float("-inf"), gl.float32, R)
        M = m
        L = gl.zeros([64], gl.float32, R)
        l = no_lanes
        o = gl.zeros([64, D], gl.float32, O)
        if tile == 0:
            stage, phase, v_stage, v_phase, m, l, o, M, L, p = step(
                q, keys, values, park, stage, phase, v_stage, v_phase, 0, m, l, o, M, L, no_p, c,
                True, True, HALF, WIDTH, SPLIT, STAGES, LS, O,
            )  # fmt: skip
        else:
            stage, phase, v_stage, v_phase, m, l, o, M, L, p128 = step(
                q, keys, values, park, stage, phase, v_stage, v_phase, 0, m, l, o, M, L, no_p, c,
                True, False, HALF, 128, SPLIT, STAGES, S, O,
            )  # fmt: skip
            for i in range(1, tile):
                stage, phase, v_stage, v_phase, m, l, o, M, L, p128 = step(
                    q, keys, values, park, stage, phase, v_stage, v_phase, i, m, l, o, M, L, p128, c,
                    False, False, HALF, 128, SPLIT, STAGES, S, O,
                )  # fmt: skip
            stage, phase, v_stage, v_phase, m, l, o, M, L, p = step(
                q, keys, values, park, stage, phase, v_stage, v_phase, tile, m, l, o, M, L, p128, c,
                False, True, HALF, WIDTH, SPLIT, STAGES, LS, O,
            )  # fmt: skip
        mbarrier.wait(v_full.index(v_stage), v_phase)
        valid = end - base - tile * 128
        if valid < 128:
            if HALF == 1:
                blank(v.index(v_stage), valid, 128)
                mbarrier.arrive(blanked, count=1)
            else:
                mbarrier.wait(blanked, blank_phase)
                blank_phase ^= 1
        mbarrier.arrive(q_empty, count=1)  # only now, so that `blanked` is not signalled again before it was seen
        o = warpgroup_mma(p, part(v.index(v_stage), WIDTH), o, use_acc=tile % SPLIT != 0, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = advance(v_stage, v_phase, STAGES)
        l1 = gl.convert_layout(one_lane(l), R)
        if tile < SPLIT:
            M = m
            L = l1
        else:
            M, L, o = merge(M, L, park, m, l1, o, c, O)
        inverse = gl.div_rn(L * 0.0 + 1.0, L)
        y = o * by_row(inverse, O) + 0.0
        # through shared memory, for 16-byte stores
        B: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        BOX: gl.constexpr = q.type.layout
        room = reinterpret(park, gl.bfloat16, [2, 64, D], BOX).index(0)
        room.store(y.to(gl.bfloat16))
        token = base + tile * 128 + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, B))
        d = gl.arange(0, D, gl.SliceLayout(0, B))
        at = gl.expand_dims((token.to(gl.int64) * HEADS + head) * D, 1) + gl.expand_dims(d, 0)
        stored = token < end
        if PAGED:
            stored = stored & (token >= begin)
        gl.store(out + at, room.load(B), mask=gl.expand_dims(stored, 1) & gl.expand_dims(d < D, 0))
        row = base + tile * 128 + HALF * 64 + gl.arange(0, 64, R)
        e = gl.fma(log_f32(L), L * 0.0 + 1.44269502162933349609375, M * c)
        stored = row < end
        if PAGED:
            stored = stored & (row >= begin)
        gl.store(lse + row.to(gl.int64) * HEADS + head, e, mask=stored)
        base, begin, end, tile, head, slot, slot_phase = read(board, slot, slot_phase, 4)


@gluon.jit(do_not_specialize=["width"])
def packed_kernel(
    qd,
    kd,
    vd,
    out,
    lse,
    queue,
    table,
    width,
    c,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    HS: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
    PARK: gl.constexpr,
):
    """Computes out and lse of all tiles: one warp produces, two warpgroups consume."""
    q0 = gl.allocate_shared_memory(gl.bfloat16, [64, D], qd.layout)
    q1 = gl.allocate_shared_memory(gl.bfloat16, [64, D], qd.layout)
    park0 = gl.allocate_shared_memory(gl.float32, [1, 64, D], PARK)
    park1 = gl.allocate_shared_memory(gl.float32, [1, 64, D], PARK)
    k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D], BLOCK)
    v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D], BLOCK)
    q_full = barriers(1, 1).index(0)
    q_empty = barriers(1, 2).index(0)
    blanked = barriers(1, 1).index(0)
    keys = (k, barriers(STAGES, 1), barriers(STAGES, 2))
    values = (v, barriers(STAGES, 1), barriers(STAGES, 2))
    board = allocate_board(2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (out, lse, q0, q_full, q_empty, keys, values, blanked, board, park0, c,
                 0, HEADS, D, SPLIT, STAGES, PAGE > 0, 64, HS, S, O),
            ),
            (
                consumer,
                (out, lse, q1, q_full, q_empty, keys, values, blanked, board, park1, c,
                 1, HEADS, D, SPLIT, STAGES, PAGE > 0, 128, S, S, O),
            ),
            (
                producer,
                (qd, kd, vd, queue, table, width, (q0, q1, q_full, q_empty), keys, values, board,
                 HEADS, KV_HEADS, D, STAGES, PAGE),
            ),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )  # fmt: skip


@cache
def _layouts(D: int) -> tuple:
    return box_layout(128, D), accumulator(64), accumulator(128), accumulator(D), park_layout(D)


def readable(pages: Pages) -> bool:
    """Says whether a block of 128 keys is whole boxes of TMA: whole swizzle rows of pages, or a part of one."""
    return pages.packed or (pages.size % 8 == 0 and (128 % pages.size == 0 or pages.size % 128 == 0))


def launch(q, keys, values, pages, out, lse, c, key_split, *, blocks=None):  # type: ignore[no-untyped-def]
    """Fills out and lse, for a key block of 128, and pages that are `readable`."""
    (T, heads, D), kv_heads = q.shape, keys.shape[1]
    sequences, page = pages.starts.numel() - 1, 0 if pages.packed else pages.size
    count = cdiv(T, 128) + (1 if pages.packed else 2) * sequences  # at least the number of tiles
    queue = torch.empty(4 + 5 * count, dtype=torch.int32, device=q.device)
    power = next_power_of_2(sequences)
    run(tiles_kernel, (sequences,), pages.starts, pages.position, queue, sequences, power, page > 0, num_warps=1)
    box = (min(page, 128), 64) if page else (128, D)
    card = card_of(q.device)
    grid = (min(blocks or card.multiprocessors, count * heads),)
    stages = min(4, (card.shared_memory - 2048 - 128 * D * 6) // (128 * D * 4))
    run(
        packed_kernel,
        grid,
        head_boxes(q, 64),
        head_boxes(keys, *box),
        head_boxes(values, *box),
        out,
        lse,
        queue,
        pages.table,
        pages.table.stride(0),
        c,
        heads,
        kv_heads,
        D,
        page,
        key_split // 128,
        stages,
        *_layouts(D),
        num_warps=4,
        enable_fp_fusion=False,
    )
