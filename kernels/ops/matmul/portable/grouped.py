"""dW: y = a^T b summed over rows, a leaf for each group of rows, at offsets that the device alone knows.

A block owns one tile at a time and walks its leaves. Finished subtrees wait in memory, one place a level, as the digits of a
binary counter do: a leaf merges with as many as its number has trailing one bits.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, launch


@triton.jit(do_not_specialize=["leaves"])
def grouped_kernel(
    a,
    b,
    y,
    parked,
    bounds,
    M,
    N,
    leaves,
    sums,
    am,
    ak,
    bn,
    bk,
    LEVELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Computes tiles of y [sums, M, N]: of each sum, rows bounds[s, 0] to bounds[s, leaves] of a [K, M] and b [K, N]."""
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(N, BN)
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    k = tl.arange(0, BK)
    place = parked + tl.program_id(0).to(tl.int64) * (LEVELS * BM * BN) + i[:, None] * BN + j[None, :]
    for tile in range(tl.program_id(0), sums * rows * columns, tl.num_programs(0)):
        own = tile // (rows * columns)
        m = (tile // columns % rows * BM + i).to(tl.int64)
        n = (tile % columns * BN + j).to(tl.int64)
        mine = bounds + own.to(tl.int64) * (leaves + 1)
        first = tl.load(mine)
        for leaf in range(leaves):
            last = tl.load(mine + leaf + 1)
            node = tl.zeros((BM, BN), tl.float32)
            for k0 in range(first, last, BK):
                at = k0 + k
                x = tl.load(
                    a + at[None, :] * ak + m[:, None] * am, mask=(at < last)[None, :] & (m < M)[:, None], other=0.0
                )
                w = tl.load(
                    b + at[:, None] * bk + n[None, :] * bn, mask=(at < last)[:, None] & (n < N)[None, :], other=0.0
                )
                node = tl.dot(x, w, node)
            first = last
            level = 0
            tl.debug_barrier()
            while ((leaf >> level) & 1) == 1:
                node = tl.load(place + level * (BM * BN)) + node
                level += 1
            tl.debug_barrier()
            tl.store(place + level * (BM * BN), node)
        tl.debug_barrier()
        root = tl.zeros((BM, BN), tl.float32)  # no node is -0: a leaf begins with +0
        for level in tl.static_range(LEVELS):
            if ((leaves >> level) & 1) == 1:
                root = tl.load(place + level * (BM * BN)) + root
        to = y + own.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
        tl.store(to, root, mask=(m < M)[:, None] & (n < N)[None, :])


def launch_sums(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor, y: torch.Tensor) -> None:
    """Computes y[s] = the tree over leaves of a^T b: a [K, M] and b [K, N] bfloat16, of any strides; bounds int64
    [S, leaves + 1], or [leaves + 1] for one sum; y float32 [S * M, N], contiguous."""
    M, N = a.shape[1], b.shape[1]
    bounds = bounds.reshape(-1, bounds.shape[-1]).contiguous()
    sums, leaves = bounds.shape[0], bounds.shape[1] - 1
    BM, BN, BK = 64 if M <= 64 else 128, 64 if N <= 64 else 128, 32
    levels = leaves.bit_length()
    blocks = min(sums * cdiv(M, BM) * cdiv(N, BN), 2 * card_of(a.device).multiprocessors)
    parked = y.new_empty(blocks * levels * BM * BN)
    given = (a, b, y, parked, bounds, M, N, leaves, sums, a.stride(1), a.stride(0), b.stride(1), b.stride(0))
    launch(grouped_kernel, (blocks,), *given, levels, BM, BN, BK, num_warps=8, num_stages=3)
