"""Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4)."""

import math

import torch

from kernels.device import UnsupportedError, same_device
from kernels.ops.reduce import sum_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, groups: torch.Tensor | None = None) -> torch.Tensor:
    """y = x / sqrt(mean(x^2, -1) + eps) * weight, rounded once to the dtype of x.

    x [..., n], weight [n]; float32 or bfloat16, float32 inside; a float32 weight against a bfloat16 x is a master weight and
    is rounded first. The sum of squares is in row order. The gradient of the weight
    sums over rows with one leaf for each group (`groups`: int64 offsets [G + 1] of the rows along dimension 0).

    Invariant to the number and position of rows.
    """
    if x.shape[-1] != weight.shape[0]:
        raise UnsupportedError(f"rms_norm: rows of {x.shape[-1]} against a weight of {weight.shape[0]}")
    if groups is None and weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("rms_norm: the weight needs a gradient, so `groups` must say where each group ends")
    return _RmsNorm.apply(x, weight, eps, groups)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, groups)
        ctx.eps = eps
        return same_device("rms_norm", x, weight).forward(x, weight.to(x.dtype), eps)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, groups = ctx.saved_tensors
        dx, d_rows = same_device("rms_norm", x, dy).backward(x, weight.to(x.dtype), dy, ctx.eps)
        dw = None
        if ctx.needs_input_grad[1]:
            rows = math.prod(x.shape[1:-1])  # rows of each token (heads, for the q and k norms)
            dw = sum_rows(d_rows.reshape(-1, x.shape[-1]), groups * rows).to(weight.dtype)
        return dx, dw, None, None
