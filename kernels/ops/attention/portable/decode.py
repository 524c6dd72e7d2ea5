"""Attention of one query a sequence over paged keys: a block owns one split of keys of one key-value head, with all the query
heads that share it. The block that arrives last at a (sequence, key-value head) merges the splits in ascending order."""

import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, next_power_of_2
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done
from kernels.gpu.workspace import counters
from kernels.ops.attention.portable.rows import LANES, block, finish, half_block, merge


@early
@triton.jit
def decode_kernel(
    q,
    keys,
    values,
    table,
    sequence,
    position,
    out,
    lse,
    parts,
    arrived,
    width,
    qt,
    kt,
    vt,
    c,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes one split of one query's attention; the last split of it to arrive merges them all into out and lse."""
    previous_done()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    part = tl.program_id(0)
    kv = tl.program_id(1)
    t = tl.program_id(2).to(tl.int64)
    at = tl.load(position + t)
    count = at + 1
    splits = (count + KEY_SPLIT - 1) // KEY_SPLIT
    if part < splits:
        s = tl.load(sequence + t).to(tl.int64)
        r = tl.arange(0, ROWS)
        there = r < GROUP
        d = tl.arange(0, D)
        head = kv * GROUP + r
        x = tl.load(q + t * qt + head[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS, LANES), tl.float32)
        o = tl.zeros((ROWS, D), tl.float32)
        k = keys + kv * D
        v = values + kv * D
        mine = table + s * width
        for first in tl.range(
            part * KEY_SPLIT, tl.minimum((part + 1) * KEY_SPLIT, count), KEY_BLOCK, num_stages=STAGES
        ):
            s0, v0 = half_block(x, k, v, mine, 0, first, count, at, kt, vt, D, PAGE, False, KEY_BLOCK // 2)
            s1, v1 = half_block(
                x, k, v, mine, 0, first + KEY_BLOCK // 2, count, at, kt, vt, D, PAGE, False, KEY_BLOCK // 2
            )
            m, l, o = block(s0, s1, v0, v1, m, l, o, c)
        total = fold(l)
        M = tl.full((ROWS,), float("-inf"), tl.float32)
        L = tl.zeros((ROWS,), tl.float32)
        O = tl.zeros((ROWS, D), tl.float32)
        last = splits == 1
        if last:
            M, L, O = merge(M, L, O, m, total, o, c)
        else:
            # parts [T, kv heads, splits, GROUP, D + 2]: o, then m and l
            parked = parts + (t * KV_HEADS + kv) * tl.num_programs(0) * (GROUP * (D + 2))
            node = parked + part * (GROUP * (D + 2)) + r * (D + 2)
            tl.store(node[:, None] + d[None, :], o, mask=there[:, None], cache_modifier=".cg")
            tl.store(node + D, m, mask=there, cache_modifier=".cg")
            tl.store(node + D + 1, total, mask=there, cache_modifier=".cg")
            tl.debug_barrier()
            last = tl.atomic_add(arrived + t * KV_HEADS + kv, 1, sem="acq_rel") == splits - 1
            if last:
                tl.debug_barrier()
                for i in range(0, splits):
                    node = parked + i * (GROUP * (D + 2)) + r * (D + 2)
                    m = tl.load(node + D, mask=there, other=0.0, cache_modifier=".cg")
                    l1 = tl.load(node + D + 1, mask=there, other=1.0, cache_modifier=".cg")
                    o = tl.load(node[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
                    M, L, O = merge(M, L, O, m, l1, o, c)
                tl.store(arrived + t * KV_HEADS + kv, 0)
        if last:
            y, e = finish(M, L, O, c)
            tl.store(
                out + (t * HEADS + head)[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=there[:, None]
            )
            tl.store(lse + t * HEADS + head, e, mask=there)


def launch(q, keys, values, pages, out, lse, c, key_block, key_split, *, warps=None, stages=None):  # type: ignore[no-untyped-def]
    """Fills out and lse for one query a sequence, q [T, H, D]; `warps` and `stages` decide speed alone."""
    T, heads, D = q.shape
    if warps is None:  # where blocks are many and short, two warps wait less for each other
        reach = pages.table.shape[1] * pages.size
        blocks = T * keys.shape[1]
        short = (reach <= 2 * key_block and blocks >= 256) or (reach <= 8 * key_block and blocks >= 1024)
        warps = 2 if short and D <= 128 else 4
    stages = stages or (1 if D > 128 else 2)  # shared memory holds one block of wide keys and values
    kv_heads = keys.shape[1]
    rows = max(16, next_power_of_2(heads // kv_heads))
    splits = cdiv(pages.table.shape[1] * pages.size, key_split)
    parts = lse if splits == 1 else lse.new_empty(T, kv_heads, splits, heads // kv_heads, D + 2)
    run(
        decode_kernel,
        (splits, kv_heads, T),
        q,
        keys,
        values,
        pages.table,
        pages.sequence,
        pages.position,
        out,
        lse,
        parts,
        counters(q.device, T * kv_heads),
        pages.table.stride(0),
        q.stride(0),
        keys.stride(0),
        values.stride(0),
        c,
        heads,
        kv_heads,
        D,
        pages.size,
        rows,
        key_block,
        key_split,
        stages,
        num_warps=card_of(q.device).warps(warps, rows),
        enable_fp_fusion=False,
    )
