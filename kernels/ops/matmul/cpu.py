"""CPU matmul: see cpu.c. bfloat16 is widened first, which is exact."""

import torch

from kernels.cpu import call


def contract(a: torch.Tensor, b: torch.Tensor, bounds: list[int], out_dtype: torch.dtype) -> torch.Tensor:
    """y[m, n] = tree over leaves bounds[i] <= k < bounds[i + 1] of sum_k a[m, k] b[n, k]; any strides."""
    (M, K), N = a.shape, b.shape[0]
    a, b = a.float(), b.float()
    y = torch.empty(M, N)
    offsets = torch.tensor(bounds, dtype=torch.int64)
    call("matmul", a, M, *a.stride(), b, N, *b.stride(), y, K, offsets, len(bounds) - 1, strided=True)
    return y.to(out_dtype)
