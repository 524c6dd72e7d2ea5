"""CPU swiglu: see cpu.c."""

import torch

from kernels.cpu import call


def forward(x: torch.Tensor, stripe: int) -> torch.Tensor:
    """Computes silu(gate) up in float32, rounded once: x [T, 2 N], gate and up in turns of `stripe` columns -> [T, N]."""
    rows, n = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, n)
    call("swiglu", x.float().contiguous(), y, rows, n, stripe)
    return y.to(x.dtype)


def backward(x: torch.Tensor, dy: torch.Tensor, stripe: int) -> torch.Tensor:
    """Computes the gradient to x [T, 2 N] from dy [T, N], in x's dtype."""
    x32 = x.float().contiguous()
    dx = torch.empty_like(x32)
    call("swiglu_backward", x32, dy.float().contiguous(), dx, x.shape[0], x.shape[1] // 2, stripe)
    return dx.to(x.dtype)
