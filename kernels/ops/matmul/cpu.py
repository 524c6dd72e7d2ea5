"""CPU matmul: see cpu.c. bfloat16 is widened first, which is exact."""

import torch

from kernels.cpu import call
from kernels.device import check_groups


def contract(
    a: torch.Tensor, b: torch.Tensor, bounds: list[int] | torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Computes y[m, n] = tree over leaves bounds[i] <= k < bounds[i + 1] of sum_k a[m, k] b[n, k]; any strides."""
    (M, K), N = a.shape, b.shape[0]
    a, b = a.float(), b.float()
    y = torch.empty(M, N)
    offsets = torch.as_tensor(bounds)
    check_groups("matmul", offsets, K)
    call("matmul", a, M, *a.stride(), b, N, *b.stride(), y, K, offsets, len(offsets) - 1, strided=True)
    return y.to(out_dtype)
