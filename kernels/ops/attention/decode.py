"""Attention of one query a sequence over paged keys: a block owns one split of keys of one key-value head, with all the query
heads that share it; where there are many sequences, the first block owns the first splits and merges them as they come. The
block that arrives last at a (sequence, key-value head) merges what the blocks found in ascending order."""

import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.workspace import counters
from kernels.ops.attention.rows import LANES, block, finish, half_block, merge


@triton.jit
def node_of(part, splits, FOLDED: tl.constexpr):
    """(first split of a part, how many parts there are): the first FOLDED splits are one part, each of the others is one."""
    return tl.where(part == 0, 0, part + FOLDED - 1), tl.maximum(splits - FOLDED + 1, 1)


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
    FOLDED: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)  # last, so that the end of a context, the shorter work, comes at the end
    at = tl.load(position + t)
    count = at + 1
    first_split, nodes = node_of(part, (count + KEY_SPLIT - 1) // KEY_SPLIT, FOLDED)
    begin = first_split * KEY_SPLIT
    if begin < count:
        s = tl.load(sequence + t).to(tl.int64)
        r = tl.arange(0, ROWS)
        there = r < GROUP
        d = tl.arange(0, D)
        head = kv * GROUP + r
        x = tl.load(q + t * qt + head[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS, LANES), tl.float32)
        o = tl.zeros((ROWS, D), tl.float32)
        M = tl.full((ROWS,), float("-inf"), tl.float32)
        L = tl.zeros((ROWS,), tl.float32)
        O = tl.zeros((ROWS, D), tl.float32)
        k = keys + kv * D
        v = values + kv * D
        mine = table + s * width
        end = tl.minimum(tl.where(part == 0, FOLDED * KEY_SPLIT, begin + KEY_SPLIT), count)
        for first in tl.range(begin, end, KEY_BLOCK, num_stages=STAGES):
            if FOLDED > 1:  # noqa: SIM102 a constant: no code where it is 1
                if (first % KEY_SPLIT == 0) & (first > begin):
                    M, L, O = merge(M, L, O, m, fold(l), o, c)
                    m = tl.full((ROWS,), float("-inf"), tl.float32)
                    l = tl.zeros((ROWS, LANES), tl.float32)
                    o = tl.zeros((ROWS, D), tl.float32)
            s0, v0 = half_block(x, k, v, mine, 0, first, count, at, kt, vt, D, PAGE, False, KEY_BLOCK // 2)
            s1, v1 = half_block(
                x, k, v, mine, 0, first + KEY_BLOCK // 2, count, at, kt, vt, D, PAGE, False, KEY_BLOCK // 2
            )
            m, l, o = block(s0, s1, v0, v1, m, l, o, c)
        M, L, O = merge(M, L, O, m, fold(l), o, c)
        last = nodes == 1
        if nodes > 1:
            # parts [T, kv heads, nodes, GROUP, D + 2]: O, then M and L
            parked = parts + (t * KV_HEADS + kv) * tl.num_programs(2) * (GROUP * (D + 2))
            node = parked + part * (GROUP * (D + 2)) + r * (D + 2)
            tl.store(node[:, None] + d[None, :], O, mask=there[:, None], cache_modifier=".cg")
            tl.store(node + D, M, mask=there, cache_modifier=".cg")
            tl.store(node + D + 1, L, mask=there, cache_modifier=".cg")
            tl.debug_barrier()
            last = tl.atomic_add(arrived + t * KV_HEADS + kv, 1, sem="acq_rel") == nodes - 1
            if last:
                tl.debug_barrier()
                M = tl.full((ROWS,), float("-inf"), tl.float32)
                L = tl.zeros((ROWS,), tl.float32)
                O = tl.zeros((ROWS, D), tl.float32)
                for i in range(0, nodes):
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


FULL = 1024
"""Pairs of a sequence and a key-value head that fill a GPU even where the first two splits of each go to one block."""


def launch(
    q, keys, values, pages, out, lse, c, key_block, key_split, *, warps=None, stages=None, folded=None, regs=None
):  # type: ignore[no-untyped-def]
    T, heads, D = q.shape
    if warps is None:  # where blocks are many and short, two warps wait less for each other
        reach = pages.table.shape[1] * pages.size
        warps = 2 if reach <= 2 * key_block and T * keys.shape[1] >= 256 and D <= 128 else 4
    stages = stages or (1 if D > 128 else 2)  # shared memory holds one block of wide keys and values
    kv_heads = keys.shape[1]
    folded = folded or (2 if T * kv_heads >= FULL else 1)
    nodes = max(triton.cdiv(pages.table.shape[1] * pages.size, key_split) - folded + 1, 1)
    parts = lse if nodes == 1 else lse.new_empty(T, kv_heads, nodes, heads // kv_heads, D + 2)
    decode_kernel[(kv_heads, T, nodes)](
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
        max(16, triton.next_power_of_2(heads // kv_heads)),
        key_block,
        key_split,
        folded,
        stages,
        num_warps=warps,
        enable_fp_fusion=False,
        **({"maxnreg": regs} if regs else {}),
    )
