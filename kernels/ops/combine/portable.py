"""GPU combine: all rows of a token's choices are on their way before the first is added."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import cdiv, launch, next_power_of_2
from kernels.gpu.overlap import early, previous_done

LANES = 1024
"""Of the sum over a row: `d_weights`."""


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
