"""Many rows: y = a^T b summed over k, on a tree whose leaves are equal parts of it (forward, dX), or lie between offsets that
the device alone knows (dW: a leaf for each group of tokens).

A block owns one tile at a time and walks its leaves, a unit of some at once in registers. Finished units wait in memory, one
place a level, as the digits of a binary counter do: a unit merges with as many as its number has trailing one bits. Leaves
that a last unit lacks are empty, and add +0: no node is -0, as a leaf begins with +0.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, launch
from kernels.ops.matmul.portable.plans import ManyRows, many_rows_plan

_BAND = 8
"""Rows of tiles that blocks go through column by column, so that a wave of blocks shares what it reads."""


@triton.jit
def chain(
    a, b, first, last, ak, bk, inside_m, inside_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Computes one leaf over first <= k < last -> float32 [BM, BN]. a [BM, 1], b [1, BN]: where columns begin. EVEN: a leaf has
    whole steps. WHOLE: so has every tile rows and columns."""
    total = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    for k0 in range(first, last, BK):
        at = (k0 + k).to(tl.int64)
        if EVEN and WHOLE:
            x = tl.load(a + at[None, :] * ak)
            w = tl.load(b + at[:, None] * bk)
        elif EVEN:
            x = tl.load(a + at[None, :] * ak, mask=inside_m[:, None], other=0.0)
            w = tl.load(b + at[:, None] * bk, mask=inside_n[None, :], other=0.0)
        elif WHOLE:
            x = tl.load(a + at[None, :] * ak, mask=(at < last)[None, :], other=0.0)
            w = tl.load(b + at[:, None] * bk, mask=(at < last)[:, None], other=0.0)
        else:
            x = tl.load(a + at[None, :] * ak, mask=(at < last)[None, :] & inside_m[:, None], other=0.0)
            w = tl.load(b + at[:, None] * bk, mask=(at < last)[:, None] & inside_n[None, :], other=0.0)
        total = tl.dot(x, w, total)
    return total


@triton.jit
def unit(
    a, b, bounds, leaf, leaves, extent, ak, bk, inside_m, inside_n, COUNT: tl.constexpr, EQUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Computes the root of COUNT leaves from `leaf` on, of which those past the last are empty: -> float32 [BM, BN]."""
    if COUNT == 1:
        if EQUAL:
            first = leaf * extent
            last = first + extent
        else:
            first = tl.load(bounds + tl.minimum(leaf, leaves))
            last = tl.load(bounds + tl.minimum(leaf + 1, leaves))
        return chain(a, b, first, last, ak, bk, inside_m, inside_n, BM, BN, BK, EVEN, WHOLE)
    else:
        left = unit(
            a, b, bounds, leaf, leaves, extent, ak, bk, inside_m, inside_n, COUNT // 2, EQUAL, BM, BN, BK, EVEN, WHOLE
        )  # fmt: skip
        return left + unit(
            a, b, bounds, leaf + COUNT // 2, leaves, extent, ak, bk, inside_m, inside_n, COUNT // 2, EQUAL, BM, BN, BK,
            EVEN, WHOLE
        )  # fmt: skip


@triton.jit
def place_of(tile, rows, columns, BAND: tl.constexpr):
    """Returns (row, column) of a tile: bands of BAND rows, column by column."""
    first = tile // (BAND * columns) * BAND
    height = tl.minimum(rows - first, BAND)
    return first + tile % (BAND * columns) % height, tile % (BAND * columns) // height


@triton.jit(do_not_specialize=["leaves", "sums"])
def grouped_kernel(
    a,
    b,
    y,
    parked,
    bounds,
    M,
    N,
    extent,
    leaves,
    sums,
    am,
    ak,
    bn,
    bk,
    LEVELS: tl.constexpr,
    UNIT: tl.constexpr,
    EQUAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BAND: tl.constexpr,
):
    """Computes tiles of y [sums, M, N]: of each sum, k from bounds[s, 0] to bounds[s, leaves] of a [K, M] and b [K, N]; or,
    EQUAL, leaves of `extent`. UNIT: leaves that meet in registers; LEVELS: of the tree above."""
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(N, BN)
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    place = parked + tl.program_id(0).to(tl.int64) * (LEVELS * BM * BN) + i[:, None] * BN + j[None, :]
    for tile in range(tl.program_id(0), sums * rows * columns, tl.num_programs(0)):
        own = tile // (rows * columns)
        row, column = place_of(tile % (rows * columns), rows, columns, BAND)
        m = (row * BM + i).to(tl.int64)
        n = (column * BN + j).to(tl.int64)
        inside_m, inside_n = m < M, n < N
        mine = bounds if EQUAL else bounds + own.to(tl.int64) * (leaves + 1)
        left, right = a + m[:, None] * am, b + n[None, :] * bn
        to = y + own.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
        mask = inside_m[:, None] & inside_n[None, :]
        if LEVELS == 0:
            root = unit(
                left, right, mine, 0, leaves, extent, ak, bk, inside_m, inside_n, UNIT, EQUAL, BM, BN, BK, EVEN, WHOLE
            )  # fmt: skip
            tl.store(to, root.to(y.dtype.element_ty), mask=mask)
        else:
            units = (leaves + UNIT - 1) // UNIT
            for u in range(units):
                node = unit(
                    left, right, mine, u * UNIT, leaves, extent, ak, bk, inside_m, inside_n, UNIT, EQUAL, BM, BN, BK,
                    EVEN, WHOLE
                )  # fmt: skip
                level = 0
                tl.debug_barrier()
                while ((u >> level) & 1) == 1:
                    node = tl.load(place + level * (BM * BN)) + node
                    level += 1
                tl.debug_barrier()
                tl.store(place + level * (BM * BN), node)
            tl.debug_barrier()
            root = tl.zeros((BM, BN), tl.float32)
            for level in tl.static_range(LEVELS):
                if ((units >> level) & 1) == 1:
                    root = tl.load(place + level * (BM * BN)) + root
            tl.store(to, root.to(y.dtype.element_ty), mask=mask)
            tl.debug_barrier()


def _run(a, b, y, bounds, leaves, sums, extent, plan):  # type: ignore[no-untyped-def]
    M, N, card = a.shape[1], b.shape[1], card_of(a.device)
    BM, BN, BK, UNIT, warps, stages = plan or many_rows_plan(M, N, leaves, extent > 0, card)
    units = cdiv(leaves, UNIT)
    levels = units.bit_length() if units > 1 else 0
    whole, even = M % BM == 0 and N % BN == 0, extent > 0 and extent % BK == 0
    blocks = min(sums * cdiv(M, BM) * cdiv(N, BN), card.multiprocessors * (1 if BM * BN > 8192 else 2))
    stages = min(stages, (card.shared_memory - 1024) // ((BM + BN) * BK * 2))
    parked = y.new_empty(blocks * levels * BM * BN if levels else 1, dtype=torch.float32)
    given = (a, b, y, parked, bounds, M, N, extent, leaves, sums, a.stride(1), a.stride(0), b.stride(1), b.stride(0))
    constants = (levels, UNIT, extent > 0, BM, BN, BK, even, whole, _BAND)
    launch(grouped_kernel, (blocks,), *given, *constants, num_warps=card.warps(warps, BM), num_stages=stages)


def launch_sums(
    a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor, y: torch.Tensor, plan: ManyRows | None = None
) -> None:
    """Computes y[s] = the tree over leaves of a^T b: a [K, M] and b [K, N] bfloat16, of any strides; bounds int64
    [S, leaves + 1], or [leaves + 1] for one sum; y float32 [S * M, N], contiguous."""
    bounds = bounds.reshape(-1, bounds.shape[-1]).contiguous()
    _run(a, b, y, bounds, bounds.shape[1] - 1, bounds.shape[0], 0, plan)


def contract(
    x: torch.Tensor, w: torch.Tensor, leaves: int, out_dtype: torch.dtype, plan: ManyRows | None = None
) -> torch.Tensor:
    """Computes y = x w^T on the tree: x [M, K], w [N, K], of any strides; `leaves` equal leaves, a power of two."""
    y = x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)
    _run(x.T, w.T, y, y, leaves, 1, x.shape[1] // leaves, plan)
    return y
