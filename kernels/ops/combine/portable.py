"""GPU combine: all rows of a token's choices are on their way before the first is added."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import cdiv, launch, next_power_of_2
from kernels.gpu.overlap import early, previous_done
from kernels.ops.rms_norm import portable as rms_norm

LANES = 1024
"""Of the sum over a row: `d_weights`."""
FUSED = range(33, 1025)
"""Numbers of rows for which one kernel adds and norms too: a block has a row, and few rows are sooner done by more blocks."""


@triton.jit
def subtree(values, shares, places, leaf, COUNT: tl.constexpr, K: tl.constexpr):
    """Returns the root of COUNT leaves from number `leaf` on: the tree over chains of K choices at most, in their order. Which
    leaf a choice falls into is one number for the block, so that a leaf passes over those that are not its own."""
    if COUNT == 1:
        node = tl.zeros(values[0].shape, tl.float32)
        for i in tl.static_range(K):
            if places[i] == leaf:
                node = tl.fma(tl.zeros(node.shape, tl.float32) + shares[i], values[i], node)
        return node
    else:
        left = subtree(values, shares, places, leaf, COUNT // 2, K)
        return left + subtree(values, shares, places, leaf + COUNT // 2, COUNT // 2, K)


@early
@triton.jit
def combine_kernel(
    y, weights, of, ids, out, n, first, extent, K: tl.constexpr, LEAVES: tl.constexpr, BLOCK: tl.constexpr
):
    """Computes BLOCK columns of one token's sum over its experts. Everything is read before the first sum."""
    previous_done()
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = ()
    shares = ()
    places = ()
    for i in tl.static_range(K):
        row = tl.load(of + t * K + i).to(tl.int64)
        values += (tl.load(y + row * n + c, mask=(c < n) & (row >= 0), other=0.0).to(tl.float32),)
        shares += (tl.load(weights + t * K + i),)
        places += (tl.where(row >= 0, (tl.load(ids + t * K + i) - first) // extent, -1),)
    root = subtree(values, shares, places, 0, LEAVES, K)
    tl.store(out + t * n + c, root.to(out.dtype.element_ty), mask=c < n)


@triton.jit
def rows_at(y, rows, c, n, K: tl.constexpr):
    """Returns columns c of K rows of y, of those that are there."""
    values = ()
    for i in tl.static_range(K):
        values += (tl.load(y + rows[i] * n + c, mask=(c < n) & (rows[i] >= 0), other=0.0).to(tl.float32),)
    return values


@triton.jit
def norm_chunks(
    y,
    rows,
    shares,
    places,
    values,
    x,
    total,
    weight,
    out,
    t,
    n,
    eps,
    lane,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    LEAVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Is rms_norm's, of a row that is x and the sum of `values`. The next chunk is on its way before this one is summed."""
    c = (CHUNK * LANES + tl.arange(0, LANES))[None, :]
    own = tl.load(x + t * n + c, mask=c < n, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)
    after = values
    if CHUNK + 1 < CHUNKS:
        after = rows_at(y, rows, c + LANES, n, K)
    delta = subtree(values, shares, places, 0, LEAVES, K).to(total.dtype.element_ty).to(tl.float32)
    a = (own + delta).to(total.dtype.element_ty).to(tl.float32)
    lane = tl.fma(a, a, lane)
    if CHUNK + 1 < CHUNKS:
        inverse = norm_chunks(
            y, rows, shares, places, after, x, total, weight, out, t, n, eps, lane, CHUNK + 1, K, LEAVES, LANES, CHUNKS
        )
    else:
        one = tl.full((1,), 1.0, tl.float32)
        inverse = tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(lane), one * n) + eps))
    tl.store(total + t * n + c, a.to(total.dtype.element_ty), mask=c < n)
    tl.store(out + t * n + c, (a * inverse[:, None] * w).to(out.dtype.element_ty), mask=c < n)
    return inverse


@early
@triton.jit
def combine_add_norm_kernel(
    y,
    weights,
    of,
    ids,
    x,
    total,
    weight,
    out,
    n,
    first,
    extent,
    eps,
    K: tl.constexpr,
    LEAVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Sums one token's experts as combine_kernel does, adds its row of x and norms it."""
    previous_done()
    t = tl.program_id(0).to(tl.int64)
    rows = ()
    shares = ()
    places = ()
    for i in tl.static_range(K):
        row = tl.load(of + t * K + i).to(tl.int64)
        rows += (row,)
        shares += (tl.load(weights + t * K + i),)
        places += (tl.where(row >= 0, (tl.load(ids + t * K + i) - first) // extent, -1),)
    values = rows_at(y, rows, tl.arange(0, LANES)[None, :], n, K)
    lane = tl.zeros((1, LANES), tl.float32)
    norm_chunks(y, rows, shares, places, values, x, total, weight, out, t, n, eps, lane, 0, K, LEAVES, LANES, CHUNKS)


@triton.jit
def backward_kernel(
    d_out, y, weights, of, d_y, d_weights, n, K: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr
):
    """Computes the gradients of one choice of one token: to its row of y and to its weight."""
    t = tl.program_id(0).to(tl.int64)
    at = t * K + tl.program_id(1)
    row = tl.load(of + at).to(tl.int64)
    w = tl.load(weights + at)
    lane = tl.arange(0, LANES)
    total = tl.zeros((1, LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        c = (chunk * LANES + lane)[None, :]
        there = (c < n) & (row >= 0)
        g = tl.load(d_out + t * n + c, mask=there, other=0.0).to(tl.float32)
        v = tl.load(y + row * n + c, mask=there, other=0.0).to(tl.float32)
        total = tl.fma(v, g, total)
        tl.store(d_y + row * n + c, (g * w).to(d_y.dtype.element_ty), mask=there)
    tl.store(d_weights + at + tl.arange(0, 1), fold(total))


def forward(
    y: torch.Tensor,
    weights: torch.Tensor,
    of: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    extent: int,
    leaves: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Sums each token's weighted expert rows y [capacity, N], by leaf and up the tree of experts, into `out_dtype` [T, N]."""
    (tokens, k), n = of.shape, y.shape[1]
    out = y.new_empty(tokens, n, dtype=out_dtype)
    if tokens:
        grid, given = (tokens, cdiv(n, 512)), (y, weights.contiguous(), of, ids.contiguous(), out)
        launch(combine_kernel, grid, *given, n, first, extent, k, leaves, 512, num_warps=4, enable_fp_fusion=False)
    return out


def backward(
    d_out: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients to y, in its dtype, and to the weights, float32 [T, k]."""
    (tokens, k), n = of.shape, y.shape[1]
    d_y, d_weights = torch.empty_like(y), weights.new_empty(tokens, k)
    if tokens:
        lanes = min(LANES, next_power_of_2(n))
        given = (d_out, y, weights.contiguous(), of, d_y, d_weights, n, k, lanes, cdiv(n, lanes))
        launch(backward_kernel, (tokens, k), *given, num_warps=4, enable_fp_fusion=False)
    return d_y, d_weights


def add_norm(
    y: torch.Tensor,
    weights: torch.Tensor,
    of: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    extent: int,
    leaves: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums as `forward`, adds the sum to x and norms; returns (normed, sum)."""
    (tokens, k), n = of.shape, y.shape[1]
    if tokens not in FUSED:
        delta = forward(y, weights, of, ids, first, extent, leaves, y.dtype)
        return rms_norm.add_forward(x, delta, weight, eps)
    x = x.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    if tokens:
        lanes = min(rms_norm.LANES, next_power_of_2(n))
        given = (
            y,
            weights.contiguous(),
            of,
            ids.contiguous(),
            x,
            total,
            weight.contiguous(),
            out,
            n,
            first,
            extent,
            eps,
        )
        shape = (k, leaves, lanes, cdiv(n, lanes))
        launch(combine_add_norm_kernel, (tokens,), *given, *shape, num_warps=warps, enable_fp_fusion=False)
    return out, total
