"""Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4)."""

import math

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.reduce import sum_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Computes y = x / sqrt(mean(x^2, -1) + eps) * weight, rounded once to the dtype of x.

    x [..., n], weight [n]; float32 or bfloat16, float32 inside; a float32 weight against a bfloat16 x is a master weight and
    is rounded first. The sum of squares is in row order. The gradient of the weight
    sums over rows with one leaf for each group (`groups`: int64 offsets [G + 1] of the rows along dimension 0).

    Invariant to the number and position of rows.
    """
    _check("rms_norm", x, weight, groups)
    return _RmsNorm.apply(x, weight, eps, groups)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, *, groups: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (rms_norm(s), s) with s = x + delta rounded to the dtype of x: a residual add and the norm that follows
    it, in one pass.

    x, delta [T, n] of one dtype; the rest as in rms_norm. The outputs and the gradients have the bits of the two ops one after
    the other.
    """
    _check("add_rms_norm", x, weight, groups)
    if x.shape != delta.shape or x.dtype != delta.dtype:
        raise UnsupportedError(
            f"add_rms_norm: x {tuple(x.shape)} {x.dtype} and delta {tuple(delta.shape)} {delta.dtype} must be alike"
        )
    return _AddRmsNorm.apply(x, delta, weight, eps, groups)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, groups: torch.Tensor | None) -> None:
    if x.shape[-1] != weight.shape[0]:
        raise UnsupportedError(f"{op}: rows of {x.shape[-1]} against a weight of {weight.shape[0]}")
    if groups is None and weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(f"{op}: the weight needs a gradient, so `groups` must say where each group ends")


def _weight_gradient(
    d_rows: torch.Tensor, weight: torch.Tensor, groups: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    rows = math.prod(d_rows.shape[1:-1])  # of each token: heads, for the q and k norms
    return sum_rows(d_rows.reshape(-1, weight.shape[0]), groups * rows).to(dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, groups)
        ctx.eps, ctx.weight_dtype = eps, gradient_dtype(weight)
        return same_device("rms_norm", x, weight).forward(x, weight.to(x.dtype), eps)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, groups = ctx.saved_tensors
        dx, d_rows = same_device("rms_norm", x, dy).backward(x, weight.to(x.dtype), dy, ctx.eps)
        dw = _weight_gradient(d_rows, weight, groups, ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, groups):  # type: ignore[no-untyped-def]
        y, total = same_device("rms_norm", x, delta, weight).add_forward(x, delta, weight.to(x.dtype), eps)
        ctx.save_for_backward(total, weight, groups)
        ctx.eps, ctx.weight_dtype = eps, gradient_dtype(weight)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, dy, d_total):  # type: ignore[no-untyped-def]
        total, weight, groups = ctx.saved_tensors
        if dy is None:
            return d_total, d_total, None, None, None
        dx, d_rows = same_device("rms_norm", total, dy).backward(total, weight.to(total.dtype), dy, ctx.eps, d_total)
        dw = _weight_gradient(d_rows, weight, groups, ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        return dx, dx, dw, None, None
