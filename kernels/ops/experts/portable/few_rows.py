"""Few rows an expert (decoding): bound by the bytes of the experts that are chosen, each read once.

A block takes BN rows of one expert's matrix and up to BM of its tokens: rows of the matrix stand on the long side of the tensor
core's tile. The grid has room for every expert that could have been chosen; which ones were is known on the device alone, and
blocks past them end at once. Tokens are read where they lie (`TOKENS`), so that no copy of them is made.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp_f32
from kernels.gpu.launch import cdiv, launch
from kernels.ops.dispatch import Slots


@triton.jit
def gated(root, dtype: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """[BN, BM] in stripes of eight rows, gate and up -> silu(gate) up [BN / 2, BM], as kernels.ops.swiglu computes it from
    rounded values."""
    pairs = tl.permute(tl.reshape(root.to(dtype), (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    gate = gate.to(tl.float32)
    z = tl.div_rn(gate, 1.0 + exp_f32(-gate)) * up.to(tl.float32)
    return tl.reshape(z, (BN // 2, BM))


@triton.jit(do_not_specialize=["blocks"])
def few_experts_kernel(
    x,
    w,
    y,
    token,
    block_expert,
    starts,
    experts,
    N,
    K,
    ldx,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
):
    block = tl.program_id(1)
    if block * BM < tl.load(starts + experts):
        e = tl.load(block_expert + block).to(tl.int64)
        s = block * BM + tl.arange(0, BM)
        row = tl.load(token + s)
        there = row >= 0
        m = row if TOKENS else s
        i = tl.program_id(0) * BN + tl.arange(0, BN)
        n = e * N + i
        k = tl.arange(0, BK)
        total = tl.zeros((BN, BM), tl.float32)
        for k0 in range(0, K, BK):
            at = k0 + k
            if EVEN:
                b = tl.load(w + n[:, None] * K + at[None, :], eviction_policy="evict_first")
                a = tl.load(x + m[None, :].to(tl.int64) * ldx + at[:, None], mask=there[None, :], other=0.0)
            else:
                b = tl.load(w + n[:, None] * K + at[None, :], mask=(i < N)[:, None] & (at < K)[None, :], other=0.0)
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


class Plan(NamedTuple):
    """Rows of the matrix and steps of the contraction in a stage. Chosen on an H200 with Qwen3-30B-A3B's shapes."""

    BN: int = 64
    BK: int = 128
    warps: int = 4
    stages: int = 3


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    slots: Slots,
    *,
    tokens: bool,
    gated: bool,
    plan: Plan | None = None,
) -> torch.Tensor:
    """x [capacity, K], or, `tokens`, [T, K]; w [experts * N, K], both with contiguous rows -> [capacity, N], or, `gated`,
    [capacity, N / 2]. `slots.align` is the number of tokens of a block."""
    BN, BK, warps, stages = plan or (Plan(128, 64, 8, 4) if slots.align == 64 else Plan())
    K, N = x.shape[1], w.shape[0] // slots.experts
    y = x.new_empty(slots.capacity, N // 2 if gated else N)
    grid = (cdiv(N, BN), slots.capacity // slots.align)
    given = (x, w, y, slots.token, slots.block_expert, slots.starts, slots.experts, N, K, x.stride(0))
    tile = (slots.align, BN, BK, tokens, gated, N % BN == 0 and K % BK == 0)
    launch(few_experts_kernel, grid, *given, *tile, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    return y
