"""Matrix product as torch multiplies."""

import torch

from kernels.device import gradient_dtype


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    leaves: int,
    *,
    groups: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes y = x w^T and its gradients as in `kernels.ops.matmul`, without its order: `leaves` and `groups` are not
    read."""
    return _Matmul.apply(x, w, out_dtype or x.dtype)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, out_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        ctx.w_dtype = gradient_dtype(w)
        return product(x, w.to(x.dtype).T, out_dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, w.to(x.dtype), x.dtype)
        if ctx.needs_input_grad[1]:
            dw = product(dy.T, x, torch.float32).to(ctx.w_dtype)
        return dx, dw, None


def product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiplies a b, summed in float32, rounded once to `out_dtype`."""
    if a.dtype == out_dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out_dtype)
    return (a.float() @ b.float()).to(out_dtype)
