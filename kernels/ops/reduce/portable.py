"""GPU sums over rows and squares of a row.

Row order on a GPU: element i goes to lane i mod LANES, each lane ascends, and the lanes fold by halves: the CPU's
definition with more lanes. `sum_rows` does the same with the rows of a group, counted from its first, and then walks
the tree over groups."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold, fold_neighbours
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run

LANES = 1024
"""Lanes of a row (fewer for a shorter one: the next power of two)."""
ROW_LANES = 128
"""Lanes of the rows of a group."""
SPAN = 1024
"""Nodes whose subtree one block adds."""


@triton.jit
def square_kernel(x, y, n, LANES: tl.constexpr):
    """Sums the squares of one row of n elements in LANES lanes."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, LANES)
    lane = tl.zeros((1, LANES), tl.float32)
    for first in range(0, n, LANES):
        a = tl.load(x + r * n + first + i[None, :], mask=(first + i < n)[None, :], other=0.0)
        lane = tl.fma(a, a, lane)
    tl.store(y + r + tl.arange(0, 1), fold(lane))


@triton.jit
def lane_kernel(x, groups, lanes, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Computes lanes[g, l, i]: one lane of the rows of one group."""
    at = tl.program_id(0)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.load(groups + at // ROWS)
    last = tl.load(groups + at // ROWS + 1)
    lane = tl.zeros((WIDTH,), tl.float32)
    for r in tl.range(first + at % ROWS, last, ROWS, loop_unroll_factor=8):  # eight loads on their way
        lane = lane + tl.load(x + r * n + i, mask=i < n, other=0.0)
    tl.store(lanes + at.to(tl.int64) * n + i, lane, mask=i < n)


@triton.jit
def fold_kernel(lanes, nodes, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Computes nodes[g, i]: the lanes of one group, folded by halves."""
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = (g * ROWS + tl.arange(0, ROWS))[:, None] * n + i[None, :]
    lane = tl.load(lanes + at, mask=(i < n)[None, :], other=0.0)
    tl.store(nodes + g * n + i, fold(tl.trans(lane)), mask=i < n)


@triton.jit
def tree_kernel(nodes, roots, count, n, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    """Computes roots[b, i]: the root of the subtree of SPAN nodes. Missing ones are +0, which changes no bit of a node, as
    none is -0."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    r = b * SPAN + tl.arange(0, SPAN)
    v = tl.load(nodes + r[:, None] * n + i[None, :], mask=(r < count)[:, None] & (i < n)[None, :], other=0.0)
    tl.store(roots + b * n + i, fold_neighbours(v), mask=i < n)


def fold_rows(x: torch.Tensor) -> torch.Tensor:
    """Adds the rows of x [T, N] up the tree, one leaf a row: -> float32 [N]."""
    n = x.shape[1]
    x = x.contiguous()
    while x.shape[0] > 1:
        span = min(SPAN, triton.next_power_of_2(x.shape[0]))
        width = min(triton.next_power_of_2(n), max(1, 4096 // span))
        roots = x.new_empty(triton.cdiv(x.shape[0], span), n)
        run(tree_kernel, (roots.shape[0], cdiv(n, width)), x, roots, x.shape[0], n, span, width)
        x = roots
    return x[0]


def sum_rows(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums x [T, N] over rows, by group in lanes and up the tree of groups: -> float32 [N]."""
    n, count = x.shape[1], groups.numel() - 1
    lanes, nodes = x.new_empty(count, ROW_LANES, n), x.new_empty(count, n)
    width = 128 if n >= 128 else 32
    run(
        lane_kernel,
        (count * ROW_LANES, cdiv(n, width)),
        x.contiguous(),
        groups,
        lanes,
        n,
        ROW_LANES,
        width,
        num_warps=1,
    )
    run(fold_kernel, (count, cdiv(n, 32)), lanes, nodes, n, ROW_LANES, 32)
    return fold_rows(nodes)


def square_rows(x: torch.Tensor) -> torch.Tensor:
    """Sums the squares of each row of x [T, N]: -> float32 [T]."""
    rows, n = x.shape
    y = x.new_empty(rows)
    if rows:
        lanes = min(LANES, triton.next_power_of_2(n))
        run(square_kernel, (rows,), x.contiguous(), y, n, lanes, num_warps=max(1, lanes // 256))
    return y
