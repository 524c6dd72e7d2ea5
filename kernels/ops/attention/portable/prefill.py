"""Attention of many queries of a sequence where TMA cannot read the keys (other head_dims, pages of less than eight tokens):
a block owns 128 queries of one head and walks their keys, which are rows beside the queries' or lie in pages."""

import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.ops.attention.portable.rows import LANES, block, finish, half_block, merge, tile_of


@triton.jit
def prefill_kernel(
    q,
    keys,
    values,
    table,
    position,
    starts,
    out,
    lse,
    sequences,
    width,
    qt,
    kt,
    vt,
    c,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Computes out and lse of a tile of one head's queries by walking their keys in ascending order."""
    head = tl.program_id(0)
    kv = head // (HEADS // KV_HEADS)
    s, begin, end, tile = tile_of(starts, tl.program_id(1), sequences, SEQUENCES, ROWS)
    if s < sequences:
        token = begin + tile * ROWS + tl.arange(0, ROWS)
        there = token < end
        at = tl.load(position + token, mask=there, other=-1)
        count = tl.max(at, 0) + 1  # keys that the tile's last query sees
        d = tl.arange(0, D)
        x = tl.load(q + token.to(tl.int64)[:, None] * qt + head * D + d[None, :], mask=there[:, None], other=0.0)
        M = tl.full((ROWS,), float("-inf"), tl.float32)
        L = tl.zeros((ROWS,), tl.float32)
        O = tl.zeros((ROWS, D), tl.float32)
        last = at[:, None]
        k = keys + kv * D
        v = values + kv * D
        mine = table + s.to(tl.int64) * width
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS, LANES), tl.float32)
        o = tl.zeros((ROWS, D), tl.float32)
        if FLAT:
            for first in tl.range(0, count, KEY_BLOCK, num_stages=STAGES):
                s0, v0 = half_block(x, k, v, mine, begin, first, count, last, kt, vt, D, PAGE, PACKED, KEY_BLOCK // 2)
                s1, v1 = half_block(
                    x, k, v, mine, begin, first + KEY_BLOCK // 2, count, last, kt, vt, D, PAGE, PACKED, KEY_BLOCK // 2
                )  # fmt: skip
                m, l, o = block(s0, s1, v0, v1, m, l, o, c)
                after = first + KEY_BLOCK
                if (after % KEY_SPLIT == 0) | (after >= count):  # a split ends; loads go on across it
                    M, L, O = merge(M, L, O, m, fold(l), o, c)
                    m = tl.full((ROWS,), float("-inf"), tl.float32)
                    l = tl.zeros((ROWS, LANES), tl.float32)
                    o = tl.zeros((ROWS, D), tl.float32)
        else:
            for split in range(0, count, KEY_SPLIT):
                m = tl.full((ROWS,), float("-inf"), tl.float32)
                l = tl.zeros((ROWS, LANES), tl.float32)
                o = tl.zeros((ROWS, D), tl.float32)
                for first in tl.range(split, tl.minimum(split + KEY_SPLIT, count), KEY_BLOCK, num_stages=STAGES):
                    s0, v0 = half_block(
                        x, k, v, mine, begin, first, count, last, kt, vt, D, PAGE, PACKED, KEY_BLOCK // 2
                    )  # fmt: skip
                    s1, v1 = half_block(
                        x, k, v, mine, begin, first + KEY_BLOCK // 2, count, last, kt, vt, D, PAGE, PACKED, KEY_BLOCK // 2
                    )  # fmt: skip
                    m, l, o = block(s0, s1, v0, v1, m, l, o, c)
                M, L, O = merge(M, L, O, m, fold(l), o, c)
        y, e = finish(M, L, O, c)
        tl.store(
            out + (token.to(tl.int64)[:, None] * HEADS + head) * D + d[None, :],
            y.to(out.dtype.element_ty),
            mask=there[:, None],
        )
        tl.store(lse + token.to(tl.int64) * HEADS + head, e, mask=there)


_SEQUENCES = tuple(32 << 4 * i for i in range(5))
"""Few sizes, so that a batch of another number of sequences compiles nothing."""


def launch(q, keys, values, pages, out, lse, c, key_block, key_split, *, rows=None, warps=None, stages=None, flat=None):  # type: ignore[no-untyped-def]
    """Fills out and lse for packed queries q [T, H, D]; `rows`, `warps` and `stages` decide speed alone."""
    T, heads, D = q.shape
    wide = D > 128  # shared memory holds one block of such keys and values
    card = card_of(q.device)
    if stages is None:
        stages = 1 if wide else 3 if D < 128 or card.shared_memory >= 229_376 else 2
    rows, warps = rows or (32 if wide else 128), warps or 8
    sequences = pages.starts.numel() - 1
    grid = (heads, cdiv(T, rows) + sequences)
    run(
        prefill_kernel,
        grid,
        q,
        keys,
        values,
        pages.table,
        pages.position,
        pages.starts,
        out,
        lse,
        sequences,
        pages.table.stride(0),
        q.stride(0),
        keys.stride(0),
        values.stride(0),
        c,
        heads,
        keys.shape[1],
        D,
        pages.size,
        pages.packed,
        next(n for n in _SEQUENCES if n > sequences),
        rows,
        key_block,
        key_split,
        stages,
        not wide if flat is None else flat,
        num_warps=card.warps(warps, rows),
        enable_fp_fusion=False,
    )
