"""Matrix product on the tree."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.tree import leaf_bounds


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    leaves: int,
    *,
    groups: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes y[m, n] = sum_k x[m, k] w[n, k], summed on the tree of `leaves` leaves over k.

    x [M, K], w [N, K] (the layout of a Hugging Face weight), float32 or bfloat16; a float32 w against a bfloat16 x is a
    master weight: it is rounded to bfloat16 first, and its gradient stays float32. y [M, N] in `out_dtype` (default: that
    of x), rounded once from float32 at the root. A row-parallel shard passes its slice of K with
    leaves / size and out_dtype=float32, and `collectives` adds the roots.

    Gradients: dx sums over n on the tree of `leaves` leaves; dw sums over tokens, one leaf for each group of sequences
    (`groups`: int64 token offsets [G + 1]; required where w needs a gradient).

    Invariant to M, to the position of a row, to slices of N, to shards of K along leaves, to strides and threads; dw to
    the split of the batch into aligned sets of groups.

    Raises TreeError where `leaves` does not divide K (or N, for dx); UnsupportedError for other dtypes or shapes.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise UnsupportedError(f"matmul: x {tuple(x.shape)} and w {tuple(w.shape)} must be [M, K] and [N, K]")
    if x.dtype not in (torch.float32, torch.bfloat16) or w.dtype not in (x.dtype, torch.float32):
        raise UnsupportedError(
            f"matmul: x is {x.dtype} and w is {w.dtype}; both must be float32 or bfloat16, w not narrower"
        )
    if groups is None and w.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("matmul: w needs a gradient, so `groups` must say where each group of sequences ends")
    if not torch.is_grad_enabled():
        return _forward(x, w, leaves, out_dtype or x.dtype)  # an autograd node costs 6 us on the host
    return _Matmul.apply(x, w, leaves, groups, out_dtype or x.dtype)


def _forward(x: torch.Tensor, w: torch.Tensor, leaves: int, out_dtype: torch.dtype) -> torch.Tensor:
    bounds = leaf_bounds(x.shape[1], leaves, "contraction length")
    return same_device("matmul", x, w).contract(x, w.to(x.dtype), bounds, out_dtype)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, leaves, groups, out_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w, groups)
        ctx.leaves, ctx.w_dtype = leaves, gradient_dtype(w)
        return _forward(x, w, leaves, out_dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w, groups = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dy.to(x.dtype), w.to(x.dtype), ctx.leaves)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy.to(x.dtype), x, groups).to(ctx.w_dtype)
        return dx, dw, None, None, None


def input_gradient(dy: torch.Tensor, w: torch.Tensor, leaves: int) -> torch.Tensor:
    """Computes dx[m, k] = sum_n dy[m, n] w[n, k] on the tree over n; dy [M, N], w [N, K] -> [M, K] in the dtype of dy."""
    bounds = leaf_bounds(w.shape[0], leaves, "output width")
    return same_device("matmul", dy, w).contract(dy, w.T, bounds, dy.dtype)


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Computes dw[n, k] = sum_t dy[t, n] x[t, k]: one leaf a group of sequences; dy [T, N], x [T, K] -> float32 [N, K].

    `groups` is handed on as it is, so that a GPU need not wait for its offsets (a CPU checks where they end)."""
    return same_device("matmul", dy, x).contract(dy.T, x.T, groups.contiguous(), torch.float32)
