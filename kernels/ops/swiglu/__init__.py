"""SwiGLU (Shazeer 2020, equation 5) without its matrices."""

import torch

from kernels.device import UnsupportedError, same_device


def swiglu(x: torch.Tensor, stripe: int | None = None) -> torch.Tensor:
    """Computes y = silu(gate) * up, silu(g) = g / (1 + e^-g), rounded once to the dtype of x.

    x [T, 2 n], gate and up in turns of `stripe` columns, which divides n (default: n, gate in the first half of a row and up in
    the second) -> [T, n]. Elementwise: invariant to everything.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise UnsupportedError(f"swiglu: x {tuple(x.shape)} must be [tokens, 2 n]")
    n = x.shape[1] // 2
    if stripe is not None and (stripe < 1 or n % stripe):
        raise UnsupportedError(f"swiglu: stripes of {stripe} columns do not divide {n}")
    return _SwiGlu.apply(x, stripe or n)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stripe):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.stripe = stripe
        return same_device("swiglu", x).forward(x, stripe)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return same_device("swiglu", x, dy).backward(x, dy, ctx.stripe), None
