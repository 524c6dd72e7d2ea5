"""GPU sums over rows and squares of a row.

Row order on a GPU: element i goes to lane i mod LANES, each lane ascends, and the lanes fold by halves: the CPU's
definition with more lanes. `sum_rows` does the same with the rows of a group, counted from its first, and then walks
the tree over groups."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold

LANES = 1024
"""Lanes of a row (fewer for a shorter one: the next power of two)."""


@triton.jit
def square_kernel(x, y, n, LANES: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, LANES)
    lane = tl.zeros((1, LANES), tl.float32)
    for first in range(0, n, LANES):
        a = tl.load(x + r * n + first + i[None, :], mask=(first + i < n)[None, :], other=0.0)
        lane = tl.fma(a, a, lane)
    tl.store(y + r + tl.arange(0, 1), fold(lane))


@triton.jit
def group_kernel(x, groups, nodes, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """nodes[g, i]: the rows of one group, in row order with ROWS lanes."""
    g = tl.program_id(0)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.load(groups + g)
    last = tl.load(groups + g + 1)
    lane = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        lane = lane + tl.load(x + r[:, None] * n + i[None, :], mask=(r < last)[:, None] & (i < n)[None, :], other=0.0)
    tl.store(nodes + g.to(tl.int64) * n + i, fold(tl.trans(lane)), mask=i < n)


def sum_rows(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    n, count = x.shape[1], groups.numel() - 1
    nodes = x.new_empty(count, n)
    group_kernel[(count, triton.cdiv(n, 32))](x.contiguous(), groups, nodes, n, 128, 32, num_warps=8)
    while nodes.shape[0] > 1:  # a level of the tree: pairs, and a last node without a partner goes up as it is
        pairs = nodes.shape[0] // 2
        merged = nodes[0 : 2 * pairs : 2] + nodes[1 : 2 * pairs : 2]
        nodes = torch.cat([merged, nodes[2 * pairs :]]) if nodes.shape[0] % 2 else merged
    return nodes[0]


def square_rows(x: torch.Tensor) -> torch.Tensor:
    rows, n = x.shape
    y = x.new_empty(rows)
    if rows:
        lanes = min(LANES, triton.next_power_of_2(n))
        square_kernel[(rows,)](x.contiguous(), y, n, lanes, num_warps=max(1, lanes // 256))
    return y
