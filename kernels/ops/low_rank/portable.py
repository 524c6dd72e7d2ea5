"""GPU merge: the operations of the CPU's one by one, so the bits are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch


@triton.jit
def merge_kernel(w, a, b, out, N, K, rank, scale, BN: tl.constexpr, BK: tl.constexpr):
    """Computes w + scale (b a) of BN rows and BK columns, one chain over the rank each; all row-contiguous."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    sum = tl.zeros((BN, BK), tl.float32)
    for j in range(rank):
        of_b = tl.load(b + n * rank + j, mask=n < N, other=0.0)
        of_a = tl.load(a + j * K + k, mask=k < K, other=0.0)
        sum = tl.fma(tl.broadcast_to(of_b[:, None], (BN, BK)), tl.broadcast_to(of_a[None, :], (BN, BK)), sum)
    there = (n[:, None] < N) & (k[None, :] < K)
    at = n[:, None] * K + k[None, :]
    whole = tl.load(w + at, mask=there, other=0.0).to(tl.float32) + sum * scale
    tl.store(out + at, whole.to(out.dtype.element_ty), mask=there)


def merge(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Computes w + scale (b a): w [N, K], a [r, K], b [N, r] -> [N, K], rounded once to `dtype`."""
    (N, K), rank = w.shape, a.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=w.device)
    if N and K:
        grid = cdiv(N, 32), cdiv(K, 128)
        given = (w.contiguous(), a.contiguous(), b.contiguous(), out, N, K, rank, scale)
        launch(merge_kernel, grid, *given, 32, 128, enable_fp_fusion=False)
    return out
