"""CPU rope, and the table that every device reads: see cpu.c."""

import torch

from kernels.cpu import call
from kernels.device import UnsupportedError


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = torch.empty(angles.shape), torch.empty(angles.shape)
    call("cos_sin_table", angles.contiguous(), cosine, sine, angles.numel())
    return cosine, sine


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, positions: torch.Tensor, sign: float
) -> torch.Tensor:
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < min(len(cosine), len(sine)):
        raise UnsupportedError(f"rope: positions up to {int(positions.max())} against a table of {len(cosine)}")
    x32 = x.float().contiguous()
    y = torch.empty_like(x32)
    call("rope", x32, cosine, sine, positions, y, *x.shape, sign)
    return y.to(x.dtype)
