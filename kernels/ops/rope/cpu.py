"""CPU rope: see cpu.c."""

import torch

from kernels.cpu import call


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, positions: torch.Tensor, sign: float
) -> torch.Tensor:
    x32 = x.float().contiguous()
    y = torch.empty_like(x32)
    call("rope", x32, cosine, sine, positions, y, *x.shape, sign)
    return y.to(x.dtype)
