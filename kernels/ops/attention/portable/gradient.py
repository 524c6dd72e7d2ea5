"""Gradient of packed attention for the head_dims that packed_gradient.py does not take, without atomics: one kernel walks the
keys of a tile of queries (dq), one the queries of a tile of keys (dk, dv). With p = 2^(s c - lse) and delta = out . d_out:
d_s = p (d_out . v - delta), dq = scale d_s k, dk = scale d_s q, dv = p d_out; p and d_s are bf16 where they enter a tensor
core.

Order: dq is one chain over keys from position 0; dk and dv one chain over the query heads of the group and, within a
head, over queries. Tiles are cut from the start of a sequence, so a sequence cannot see its neighbours; masked pairs
add zeros.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, next_power_of_2
from kernels.gpu.launch import launch as run
from kernels.ops.attention.portable.rows import tile_of


@triton.jit
def delta_kernel(out, d_out, delta, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """Computes delta [rows] = out . d_out over D."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    there = r < rows
    a = tl.load(out + r[:, None] * D + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    b = tl.load(d_out + r[:, None] * D + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    tl.store(delta + r, fold(a * b), mask=there)


@triton.jit
def dq_kernel(
    q,
    keys,
    values,
    d_out,
    lse,
    delta,
    starts,
    d_q,
    sequences,
    qt,
    kt,
    vt,
    scale,
    c,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes d_q of a tile of queries by walking its keys in ascending order."""
    head = tl.program_id(0)
    kv = head // (HEADS // KV_HEADS)
    s, begin, end, tile = tile_of(starts, tl.program_id(1), sequences, SEQUENCES, ROWS)
    if s < sequences:
        at = tile * ROWS + tl.arange(0, ROWS)
        token = (begin + at).to(tl.int64)
        there = begin + at < end
        d = tl.arange(0, D)
        x = tl.load(q + token[:, None] * qt + head * D + d[None, :], mask=there[:, None], other=0.0)
        g = tl.load(d_out + (token[:, None] * HEADS + head) * D + d[None, :], mask=there[:, None], other=0.0)
        e = tl.load(lse + token * HEADS + head, mask=there, other=float("inf"))
        own = tl.load(delta + token * HEADS + head, mask=there, other=0.0)
        total = tl.zeros((ROWS, D), tl.float32)
        j = tl.arange(0, BLOCK)
        for first in tl.range(0, tl.minimum((tile + 1) * ROWS, end - begin), BLOCK, num_stages=STAGES):
            key = first + j
            row = (begin + key).to(tl.int64)
            inside = begin + key < end
            k = tl.load(keys + row[:, None] * kt + kv * D + d[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(values + row[:, None] * vt + kv * D + d[None, :], mask=inside[:, None], other=0.0)
            p = tl.exp2(tl.dot(x, tl.trans(k)) * c - e[:, None])
            p = tl.where(key[None, :] <= at[:, None], p, 0.0)
            d_s = p * (tl.dot(g, tl.trans(v)) - own[:, None])
            total = tl.dot(d_s.to(k.dtype), k, total)
        tl.store(
            d_q + (token[:, None] * HEADS + head) * D + d[None, :],
            (total * scale).to(d_q.dtype.element_ty),
            mask=there[:, None],
        )


@triton.jit
def dkv_kernel(
    q,
    keys,
    values,
    d_out,
    lse,
    delta,
    starts,
    d_k,
    d_v,
    sequences,
    qt,
    kt,
    vt,
    scale,
    c,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes d_k and d_v of a tile of keys by walking the group's heads and their queries in ascending order."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv = tl.program_id(0)
    s, begin, end, reverse = tile_of(starts, tl.program_id(1), sequences, SEQUENCES, ROWS)
    if s < sequences:
        tile = (end - begin + ROWS - 1) // ROWS - 1 - reverse  # the first keys have the most queries
        key = tile * ROWS + tl.arange(0, ROWS)
        row = (begin + key).to(tl.int64)
        there = begin + key < end
        d = tl.arange(0, D)
        k = tl.load(keys + row[:, None] * kt + kv * D + d[None, :], mask=there[:, None], other=0.0)
        v = tl.load(values + row[:, None] * vt + kv * D + d[None, :], mask=there[:, None], other=0.0)
        total_k = tl.zeros((ROWS, D), tl.float32)
        total_v = tl.zeros((ROWS, D), tl.float32)
        j = tl.arange(0, BLOCK)
        blocks = (end - begin - tile * ROWS + BLOCK - 1) // BLOCK  # of queries, from the tile's first key on
        for i in tl.range(0, blocks * GROUP, num_stages=STAGES):
            head = kv * GROUP + i // blocks
            at = tile * ROWS + (i % blocks) * BLOCK + j
            token = (begin + at).to(tl.int64)
            inside = begin + at < end
            x = tl.load(q + token[:, None] * qt + head * D + d[None, :], mask=inside[:, None], other=0.0)
            g = tl.load(d_out + (token[:, None] * HEADS + head) * D + d[None, :], mask=inside[:, None], other=0.0)
            e = tl.load(lse + token * HEADS + head, mask=inside, other=float("inf"))
            own = tl.load(delta + token * HEADS + head, mask=inside, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(x)) * c - e[None, :])
            p = tl.where(key[:, None] <= at[None, :], p, 0.0)
            total_v = tl.dot(p.to(x.dtype), g, total_v)
            d_s = p * (tl.dot(v, tl.trans(g)) - own[None, :])
            total_k = tl.dot(d_s.to(x.dtype), x, total_k)
        to = (row[:, None] * KV_HEADS + kv) * D + d[None, :]
        tl.store(d_k + to, (total_k * scale).to(d_k.dtype.element_ty), mask=there[:, None])
        tl.store(d_v + to, total_v.to(d_v.dtype.element_ty), mask=there[:, None])


def launch(q, keys, values, out, lse, d_out, starts, scale, c, *, rows=None, block=None, warps=8, stages=None):  # type: ignore[no-untyped-def]
    """Returns (d_q, d_k, d_v). The tile is free: no bit depends on it."""
    (T, heads, D), kv_heads = q.shape, keys.shape[1]
    wide = D > 128  # shared memory, and registers, hold fewer of such keys
    rows, block, stages = rows or (64 if wide else 128), block or (16 if wide else 64), stages or (1 if wide else 2)
    sequences = starts.numel() - 1
    delta = torch.empty_like(lse)
    run(delta_kernel, (cdiv(T * heads, 32),), out, d_out, delta, T * heads, D, 32, enable_fp_fusion=False)
    d_q = q.new_empty(T, heads, D)
    d_k, d_v = keys.new_empty(T, kv_heads, D), values.new_empty(T, kv_heads, D)
    tiles = cdiv(T, rows) + sequences
    sizes = (heads, kv_heads, D, next_power_of_2(sequences + 1), rows, block, stages)
    strides = (q.stride(0), keys.stride(0), values.stride(0))
    more = {"num_warps": card_of(q.device).warps(warps, rows), "enable_fp_fusion": False}
    run(
        dkv_kernel,
        (kv_heads, tiles),
        q,
        keys,
        values,
        d_out,
        lse,
        delta,
        starts,
        d_k,
        d_v,
        sequences,
        *strides,
        scale,
        c,
        *sizes,
        **more,
    )
    run(
        dq_kernel,
        (heads, tiles),
        q,
        keys,
        values,
        d_out,
        lse,
        delta,
        starts,
        d_q,
        sequences,
        *strides,
        scale,
        c,
        *sizes,
        **more,
    )
    return d_q, d_k, d_v
