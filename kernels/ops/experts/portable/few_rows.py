"""Few rows an expert (decoding): bound by the bytes of the experts that are chosen, each read once.

A block takes BN rows of one expert's matrix and BM of its tokens at a time: rows of the matrix stand on the long side of the
tensor core's tile. The grid has room for every expert that could have been chosen; which ones were is known on the device
alone, and blocks past them end at once. Tokens are read where they lie (`TOKENS`), so that no copy of them is made.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.card import card_of
from kernels.gpu.launch import cdiv, launch
from kernels.gpu.overlap import early, previous_done
from kernels.ops.dispatch import Slots
from kernels.ops.swiglu.portable import silu_times


@triton.jit
def gated(root, dtype: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Computes the gated product: [BN, BM] in stripes of eight rows, gate and up -> silu(gate) up [BN / 2, BM], as
    kernels.ops.swiglu computes it from rounded values."""
    pairs = tl.permute(tl.reshape(root.to(dtype), (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(silu_times(gate.to(tl.float32), up.to(tl.float32)), (BN // 2, BM))


@triton.jit
def one_tile(
    x,
    w,
    y,
    e,
    m,
    s,
    there,
    N,
    K,
    ldx,
    we,
    wn,
    wk,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Multiplies BN rows of an expert's matrix times tokens m, which go to rows s of y."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    mine = w + e * we + i.to(tl.int64)[:, None] * wn
    k = tl.arange(0, BK)
    total = tl.zeros((BN, BM), tl.float32)
    for k0 in range(0, K, BK):
        at = k0 + k
        if EVEN:
            b = tl.load(mine + at[None, :] * wk, eviction_policy="evict_first")
            a = tl.load(x + m[None, :].to(tl.int64) * ldx + at[:, None], mask=there[None, :], other=0.0)
        else:
            b = tl.load(mine + at[None, :] * wk, mask=(i < N)[:, None] & (at < K)[None, :], other=0.0)
            a = tl.load(
                x + m[None, :].to(tl.int64) * ldx + at[:, None], mask=there[None, :] & (at < K)[:, None], other=0.0
            )
        total = tl.dot(b, a, total)
    if GATED:
        z = gated(total, y.dtype.element_ty, BN, BM)
        j = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        to = y + s[None, :].to(tl.int64) * (N // 2) + j[:, None]
        tl.store(to, z.to(y.dtype.element_ty), mask=(j < N // 2)[:, None] & there[None, :])
    else:
        to = y + s[None, :].to(tl.int64) * N + i[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=(i < N)[:, None] & there[None, :])


@early
@triton.jit
def few_experts_kernel(
    x,
    w,
    y,
    token,
    block_expert,
    starts,
    counts,
    experts,
    N,
    K,
    ldx,
    we,
    wn,
    wk,
    stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    LOOSE: tl.constexpr,
    EACH: tl.constexpr,
):
    """Multiplies blocks of sorted rows; or, with LOOSE, experts, whose rows a block goes through; or, with EACH, choices."""
    previous_done()
    block = tl.program_id(1)
    lane = tl.arange(0, BM)
    if LOOSE:
        count = tl.load(counts + block)
        for first in range(0, count, BM):
            s = block * stride + first + lane
            there = first + lane < count
            m = tl.load(token + s, mask=there, other=0) if TOKENS else s
            one_tile(x, w, y, block.to(tl.int64), m, s, there, N, K, ldx, we, wn, wk, BM, BN, BK, GATED, EVEN)
    elif EACH:
        e = tl.load(block_expert + block).to(tl.int64)
        if e >= 0:
            s = block * BM + lane
            m = block // EACH + 0 * lane if TOKENS else s
            one_tile(x, w, y, e, m, s, lane == 0, N, K, ldx, we, wn, wk, BM, BN, BK, GATED, EVEN)
    elif block * BM < tl.load(starts + experts):
        s = block * BM + lane
        row = tl.load(token + s)
        e = tl.load(block_expert + block).to(tl.int64)
        m = row if TOKENS else s
        one_tile(x, w, y, e, m, s, row >= 0, N, K, ldx, we, wn, wk, BM, BN, BK, GATED, EVEN)


class Plan(NamedTuple):
    """Holds the rows of the matrix and steps of the contraction in a stage. Chosen on an H200 with Qwen3-30B-A3B's shapes."""

    BN: int = 64
    BK: int = 128
    warps: int = 4
    stages: int = 3


def _plan(slots: Slots) -> Plan:
    """Chooses a plan: where there are few blocks, each has more on its way."""
    if slots.align >= 64:
        return Plan(128, 64, 8, 4)
    return Plan(stages=4) if slots.loose.each else Plan()


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    slots: Slots,
    *,
    tokens: bool,
    gated: bool,
    transposed: bool = False,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Multiplies rows by their experts' matrices: x [capacity, K], or, `tokens`, [T, K]; w [experts * N, K], or, `transposed`,
    [experts * K, N], both with contiguous rows -> [capacity, N], or, `gated`, [capacity, N / 2]. `slots.align` is the number of
    tokens of a block."""
    BN, BK, warps, stages = plan or _plan(slots)
    card = card_of(x.device)
    stages = min(stages, (card.shared_memory - 1024) // ((BN + slots.align) * BK * 2))
    K = x.shape[1]
    N = w.shape[1] if transposed else w.shape[0] // slots.experts
    y = x.new_empty(slots.capacity, N // 2 if gated else N)
    loose = slots.loose
    blocks = slots.experts if loose.stride else slots.capacity // slots.align
    counts = slots.starts if loose.counts is None else loose.counts
    given = (
        x,
        w,
        y,
        slots.token,
        slots.block_expert,
        slots.starts,
        counts,
        slots.experts,
        N,
        K,
        x.stride(0),
        N * K,
        *((1, N) if transposed else (K, 1)),
        loose.stride,
    )
    tile = (slots.align, BN, BK, tokens, gated, N % BN == 0 and K % BK == 0, loose.stride > 0, loose.each)
    launch(
        few_experts_kernel,
        (cdiv(N, BN), blocks),
        *given,
        *tile,
        num_warps=card.warps(warps, BN),
        num_stages=stages,
        enable_fp_fusion=False,
    )
    return y
