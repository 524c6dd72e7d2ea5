"""What every GPU attention kernel shares: the order of one row, and where a tile of queries lies.

Row order, with c = scale * log2 e and s the tensor core's q . k (one chain over head_dim). In a split of KEY_SPLIT keys, block
by block of KEY_BLOCK from its first key:

    top = max(m, s);  shrink = 2^((m - top) c);  p = 2^(fma(s, c, -(top c)))
    l = fma(l, shrink, p folded by halves to 8 lanes);  o = o shrink, then a chain of tensor-core steps over p v (p in bf16)

At its end l folds to one lane. Splits merge in ascending order into (M, L, O): O = fma(O, 2^((M - top) c), o 2^((m - top) c)).
Keys past a row's position have s = -inf and change nothing, so a row does not depend on the tile it is computed in. No sum runs
over an axis longer than two except in the tensor core, so warps and layouts take no part (kernels.gpu.arithmetic.fold), nor
does it matter whether a block is computed whole or in halves: the first fold adds the halves, and the chain goes on.
"""

import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold_to, log_f32

LANES = tl.constexpr(8)


@triton.jit
def finite(m):
    """Returns m, or 0 for a row that has seen no key: -inf - -inf is no number."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def half_block(
    x,
    keys,
    values,
    table,
    base,
    first,
    count,
    last,
    kt,
    vt,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Returns (scores, values) of queries x [rows, D] and the KEYS keys from position `first` of one head and sequence,
    whose rows are base + position where PACKED, else found through its page numbers `table`. A query sees the keys up
    to `last` [rows, 1]; nothing is read past `count` keys."""
    j = tl.arange(0, KEYS)
    key = first + j
    there = key < count
    if PACKED:
        row = (base + key).to(tl.int64)
    elif PAGE % KEYS == 0:
        row = tl.load(table + first // PAGE, mask=first < count, other=0).to(tl.int64) * PAGE + first % PAGE + j
    else:
        row = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64) * PAGE + key % PAGE
    d = tl.arange(0, D)
    k = tl.load(keys + row[:, None] * kt + d[None, :], mask=there[:, None], other=0.0)
    v = tl.load(values + row[:, None] * vt + d[None, :], mask=there[:, None], other=0.0)
    return tl.where(key[None, :] <= last, tl.dot(x, tl.trans(k)), float("-inf")), v


@triton.jit
def block(s0, s1, v0, v1, m, l, o, c):
    """Takes one block of keys into the online softmax, as two halves (fewer registers); s0, s1 [rows, KEY_BLOCK / 2] are -inf
    at keys that a row may not see."""
    top = tl.maximum(m, tl.maximum(tl.max(s0, 1), tl.max(s1, 1)))
    safe = finite(top)
    shrink = tl.exp2((m - safe) * c)
    factor = tl.full(s0.shape, 0.0, tl.float32) + c
    offset = tl.broadcast_to((-(safe * c))[:, None], s0.shape)
    p0 = tl.exp2(tl.fma(s0, factor, offset))
    p1 = tl.exp2(tl.fma(s1, factor, offset))
    l = tl.fma(l, tl.broadcast_to(shrink[:, None], l.shape), fold_to(p0 + p1, LANES))
    o = tl.dot(p0.to(v0.dtype), v0, o * shrink[:, None])
    o = tl.dot(p1.to(v1.dtype), v1, o)
    return top, l, o


@triton.jit
def merge(M, L, O, m, l, o, c):
    """Returns (M, L, O) and the split (m, l, o) after it; l is one lane."""
    top = tl.maximum(M, m)
    safe = finite(top)
    left = tl.exp2((M - safe) * c)
    right = tl.exp2((m - safe) * c)
    O = tl.fma(O, tl.broadcast_to(left[:, None], O.shape), o * right[:, None])
    return top, tl.fma(L, left, l * right), O


@triton.jit
def finish(M, L, O, c):
    """Returns (out, base-2 log-sum-exp). The added zero turns -0 into +0."""
    return O * tl.div_rn(1.0, L)[:, None] + 0.0, tl.fma(log_f32(L), 1.44269502162933349609375, M * c)


@triton.jit
def tile_of(starts, index, sequences, SEQUENCES: tl.constexpr, ROWS: tl.constexpr):
    """Returns (sequence, first token, one past the last token, tile in the sequence) of tile `index`, where each
    sequence is cut into tiles of ROWS tokens from its own start, the last tile first. The sequence is `sequences` where
    there is no such tile."""
    i = tl.arange(0, SEQUENCES)
    first = tl.load(starts + i, mask=i < sequences, other=0).to(tl.int32)
    last = tl.load(starts + i + 1, mask=i < sequences, other=0).to(tl.int32)
    tiles = (last - first + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    s = tl.sum(((upto <= index) & (i < sequences)).to(tl.int32), 0)
    mine = i == s
    begin = tl.sum(tl.where(mine, first, 0), 0)
    end = tl.sum(tl.where(mine, last, 0), 0)
    local = tl.sum(tl.where(mine, upto, 0), 0) - 1 - index
    return s, begin, end, local
