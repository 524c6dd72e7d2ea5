"""CPU rms_norm: see cpu.c."""

import torch

from kernels.cpu import call


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scales the rows of x by weight / sqrt(mean(x^2) + eps), in float32, and rounds once to x's dtype."""
    n = x.shape[-1]
    x32 = x.float().contiguous()
    y = torch.empty_like(x32)
    call("rms_norm", x32, weight.float(), y, x.numel() // n, n, eps)
    return y.to(x.dtype)


def add_forward(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds delta to x, rounded to their dtype, and norms the sum; returns (normed, sum)."""
    total = x + delta
    return forward(total, weight, eps), total


def backward(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float, d_total: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dx in the dtype of x, plus d_total if that is given; each row's contribution to the gradient of the weight in
    float32)."""
    n = x.shape[-1]
    x32, dy32 = x.float().contiguous(), dy.float().contiguous()
    dx, d_rows = torch.empty_like(x32), torch.empty_like(x32)
    call("rms_norm_backward", x32, weight.float(), dy32, dx, d_rows, x.numel() // n, n, eps)
    dx = dx.to(x.dtype)
    return dx if d_total is None else d_total + dx, d_rows
