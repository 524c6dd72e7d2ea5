"""CPU matmul of block-scaled FP8: see cpu.c. The values of x are widened first, which is exact."""

import torch

from kernels.cpu import call


def contract(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    bounds: list[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes y [M, N] of x e4m3 [M, K] with scales [M, K / 128] and w [N, K] with [N / 128, K / 128], as
    `kernels.ops.matmul_fp8` says; leaf i is bounds[i] <= k < bounds[i + 1], all of one length."""
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty(M, N)
    of_x, of_w = (
        (x.float().contiguous(), x_scales.contiguous()),
        (w.contiguous().view(torch.uint8), w_scales.contiguous()),
    )
    call("matmul_fp8", *of_x, M, *of_w, N, y, K, len(bounds) - 1)
    return y.to(out_dtype)
