"""Few rows (decoding): y = x w^T on the tree, bound by the bytes of w.

A block takes `BN` columns and one subtree: 1 / SPLIT of the leaves, each one fp32 chain. Rows of w stand on the long side of
the tensor core's tile and tokens on the short one. Subtree roots are parked in float32; the block that arrives last at a
tile adds them in tree order, whatever the order of arrival was.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, next_power_of_2
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import bring_near, early, previous_done
from kernels.gpu.workspace import counters

_NEAR = 2048
"""Bytes of a row of w that a block brings near while it waits for the kernel before."""


@triton.jit
def leaf(x, w, first, extent, xk, wk, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr):
    """Computes one chain over first <= k < first + extent -> float32 [BN, BM]. x [1, BM], w [BN, 1]: where rows begin.
    TAIL: the last step has fewer than BK."""
    total = tl.zeros((BN, BM), tl.float32)
    k = tl.arange(0, BK)
    for k0 in range(0, extent, BK):
        at = (first + k0 + k).to(tl.int64)
        if TAIL:
            inside = k0 + k < extent
            b = tl.load(w + at[None, :] * wk, mask=inside[None, :], other=0.0)
            a = tl.load(x + at[:, None] * xk, mask=inside[:, None], other=0.0)
        else:
            b = tl.load(w + at[None, :] * wk, eviction_policy="evict_first")
            a = tl.load(x + at[:, None] * xk)
        total = tl.dot(b, a, total)
    return total


@triton.jit
def subtree(
    x,
    w,
    first,
    extent,
    xk,
    wk,
    LEAVES: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Computes the root of LEAVES adjacent leaves from `first` on: -> float32 [BN, BM]."""
    if LEAVES == 1:
        return leaf(x, w, first, extent, xk, wk, BN, BM, BK, TAIL)
    else:
        left = subtree(x, w, first, extent, xk, wk, LEAVES // 2, BN, BM, BK, TAIL)
        return left + subtree(x, w, first + LEAVES // 2 * extent, extent, xk, wk, LEAVES // 2, BN, BM, BK, TAIL)


@triton.jit
def parked(node, step, mask, COUNT: tl.constexpr):
    """Returns the root of COUNT parked nodes, `step` apart."""
    if COUNT == 1:
        return tl.load(node, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        left = parked(node, step, mask, COUNT // 2)
        return left + parked(node + COUNT // 2 * step, step, mask, COUNT // 2)


@early
@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x,
    w,
    y,
    nodes,
    arrived,
    M,
    N,
    xm,
    xk,
    wn,
    wk,
    extent,
    LEAVES: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Computes one subtree of a tile; the last of the tile's subtrees to arrive adds them all in tree order. NEAR: bytes of
    each of its rows of w that are brought near while the kernel before runs."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = (tl.program_id(2) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile * BN + tl.arange(0, BN)).to(tl.int64)
    mine: tl.constexpr = LEAVES // SPLIT
    # Rows past the last are computed from it, and not stored. A minimum hides from the compiler that rows lie side by side
    mine_n = w + (n if WHOLE else tl.minimum(n, N - 1)) * wn
    if NEAR:
        bring_near(mine_n + part * mine * extent, NEAR)
    previous_done()
    mine_m = x + tl.minimum(m, M - 1) * xm
    root = subtree(
        mine_m[None, :], mine_n[:, None], part * mine * extent, extent, xk, wk, mine, BN, BM, BK, TAIL
    )  # fmt: skip
    at = m[None, :] * N + n[:, None]
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT == 1:
        tl.store(y + at, root.to(y.dtype.element_ty), mask=mask)
    else:
        step = M.to(tl.int64) * N
        tl.store(nodes + part * step + at, root, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        counter = arrived + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            tl.debug_barrier()
            tl.store(y + at, parked(nodes + at, step, mask, SPLIT).to(y.dtype.element_ty), mask=mask)
            tl.store(counter, 0)


def _side_by_side(t: torch.Tensor) -> bool:
    """Says whether eight elements of a row are loaded at once."""
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def contract(
    x: torch.Tensor,
    w: torch.Tensor,
    leaves: int,
    out_dtype: torch.dtype,
    *,
    BN: int,
    BK: int,
    split: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """Computes y = x w^T on the tree: x [M, K], w [N, K], of any strides; `leaves` equal leaves, a power of two."""
    (M, K), N = x.shape, w.shape[0]
    y = x.new_empty(M, N, dtype=out_dtype)
    extent, card = K // leaves, card_of(x.device)
    BM = min(128, max(16, next_power_of_2(M)))
    BK = next((step for step in (256, 128, 64, 32, 16) if step <= BK and extent % step == 0), 32)
    if extent % 8 or N % 16 or not (_side_by_side(x) and _side_by_side(w)):
        BN, BK = min(BN, 64), min(BK, 32)  # single elements are loaded and stored, and their addresses take registers
    split = min(split, leaves)
    grid = (cdiv(N, BN), split, cdiv(M, BM))
    nodes = x.new_empty(split, M, N, dtype=torch.float32) if split > 1 else y
    arrived = counters(x.device, grid[0] * grid[2]) if split > 1 else y
    near = K // split % 8 == 0 and w.stride(1) == 1 and w.data_ptr() % 16 == 0 and w.stride(0) % 8 == 0
    stages = min(stages, (card.shared_memory - 1024) // ((BN + BM) * BK * 2))
    run(
        few_rows_kernel,
        grid,
        x,
        w,
        y,
        nodes,
        arrived,
        M,
        N,
        *x.stride(),
        *w.stride(),
        extent,
        leaves,
        split,
        BM,
        BN,
        BK,
        extent % BK != 0,
        N % BN == 0,
        min(_NEAR, K // split * 2) if near else 0,
        num_warps=card.warps(warps, BN),
        num_stages=stages,
    )
    return y
