"""The bias of a linear layer."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.reduce import sum_rows


def add_bias(
    root: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, *, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes y = root + bias, rounded once to `dtype`.

    root float32 [T, n], the unrounded output of `matmul`; bias [n] in `dtype`, or a float32 master that is rounded to it first
    -> [T, n]. The gradient of the root is dy; that of the bias sums over tokens with one leaf for each group of sequences
    (`groups`: int64 token offsets [G + 1]).

    Elementwise: invariant to everything.
    """
    if root.dtype != torch.float32 or root.dim() != 2 or bias.shape != root.shape[1:]:
        raise UnsupportedError(
            f"add_bias: root {tuple(root.shape)} {root.dtype} and bias {tuple(bias.shape)} must be float32 [T, n] and [n]"
        )
    if groups is None and bias.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("add_bias: the bias needs a gradient, so `groups` must say where each group ends")
    return _AddBias.apply(root, bias, dtype, groups)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, root, bias, dtype, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(groups)
        ctx.bias_dtype = gradient_dtype(bias)
        return same_device("add_bias", root, bias).forward(root, bias.to(dtype), dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (groups,) = ctx.saved_tensors
        dy = dy.float()
        db = sum_rows(dy, groups).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return dy, db, None, None
