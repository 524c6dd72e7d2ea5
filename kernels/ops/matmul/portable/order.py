"""The order as it reads: one leaf a launch, leaves added by `kernels.tree`. Any strides, any bounds, any count of leaves.

Slow and simple: nothing runs it but tests and benchmarks, which compare the other kernels with it bit by bit."""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch
from kernels.tree import Counter


@triton.jit
def chain(a, b, y, M, N, first, last, am, ak, bn, bk, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Computes y[m, n] = sum over first <= k < last of a[m, k] b[n, k]: one fp32 chain of 16-wide steps, ascending,
    from zero."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(first, last, BK):
        k = (k0 + tl.arange(0, BK)).to(tl.int64)
        x = tl.load(a + m[:, None] * am + k[None, :] * ak, mask=(m[:, None] < M) & (k[None, :] < last), other=0.0)
        w = tl.load(b + n[None, :] * bn + k[:, None] * bk, mask=(n[None, :] < N) & (k[:, None] < last), other=0.0)
        total = tl.dot(x, w, total)
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


def contract(a: torch.Tensor, b: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Returns the root in float32."""
    (M, _), N = a.shape, b.shape[0]
    tree: Counter[torch.Tensor] = Counter(torch.add)
    for first, last in pairwise(bounds):
        y = a.new_empty(M, N, dtype=torch.float32)
        grid = (cdiv(M, 64), cdiv(N, 64))
        launch(chain, grid, a, b, y, M, N, first, last, *a.stride(), *b.stride(), 64, 64, 32)
        tree.push(y)
    return tree.root()
