"""The order as it reads: one leaf a launch, leaves added by `kernels.tree`. Any shape of whole blocks, any count of leaves.

Slow and simple: nothing runs it but tests and benchmarks, which compare the other kernels with it bit by bit. It shares no code
with them: Triton makes its product a wgmma, of x's rows by w's, and scales are read where they are used."""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch
from kernels.tree import Counter


@triton.jit
def chain(x, w, sx, sw, y, M, N, K, first, last, xm, xb, BM: tl.constexpr, BN: tl.constexpr):
    """Computes acc = fma(d, sx * sw, acc) over the blocks first <= b < last, from zero; d is a product from zero."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    i = tl.arange(0, 128)
    total = tl.zeros((BM, BN), tl.float32)
    for b in range(first, last):
        a = tl.load(x + m[:, None] * K + (b * 128 + i)[None, :], mask=(m < M)[:, None], other=0.0)
        c = tl.load(w + n[None, :] * K + (b * 128 + i)[:, None])
        d = tl.dot(a, c)
        of_x = tl.load(sx + m * xm + b * xb, mask=m < M, other=0.0)
        of_w = tl.load(sw + n // 128 * (K // 128) + b)
        total = tl.fma(d, of_x[:, None] * of_w[None, :], total)
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None])


def contract(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, bounds: list[int]
) -> torch.Tensor:
    """Returns the root in float32, [M, N]; x and w contiguous e4m3."""
    (M, K), N = x.shape, w.shape[0]
    tree: Counter[torch.Tensor] = Counter(torch.add)
    for first, last in pairwise(bounds):
        y = torch.empty(M, N, dtype=torch.float32, device=x.device)
        given = x.contiguous(), w.contiguous(), x_scales, w_scales.contiguous(), y, M, N, K, first // 128, last // 128
        launch(chain, (cdiv(M, 64), cdiv(N, 64)), *given, *x_scales.stride(), 64, 64, num_warps=4)
        tree.push(y)
    return tree.root()
