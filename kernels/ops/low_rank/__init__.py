"""A low-rank addition to a frozen weight: merged into it, and its gradient (Hu et al. 2021, LoRA)."""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.matmul import weight_gradient
from kernels.tree import fold, leaf_bounds

LowRank = tuple[torch.Tensor, torch.Tensor, float]
"""a [r, K], b [N, r] and scale of what was merged into a weight."""


def merge_low_rank(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Computes w' = w + scale b a, rounded once to `dtype`: w'[n, k] = w[n, k] + scale * sum_j b[n, j] a[j, k].

    w [N, K] float32 or bfloat16, a [r, K] and b [N, r] float32 -> [N, K] in `dtype`, float32 or bfloat16. The sum is one
    float32 chain of fused multiply-adds in ascending j, from zero; its product with `scale` (the nearest float32) and the sum
    with w are float32. Elementwise in w: invariant to how its rows are sharded; both devices have the same bits.

    Raises UnsupportedError for other dtypes or shapes.
    """
    if w.dim() != 2 or a.dim() != 2 or b.shape != (w.shape[0], a.shape[0]) or a.shape[1] != w.shape[1]:
        raise UnsupportedError(
            f"merge_low_rank: w {tuple(w.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} must be [N, K], [r, K] and [N, r]"
        )
    floats = (torch.float32, torch.bfloat16)
    if (a.dtype, b.dtype) != (torch.float32, torch.float32) or w.dtype not in floats or dtype not in floats:
        raise UnsupportedError(
            f"merge_low_rank: w is {w.dtype}, a {a.dtype}, b {b.dtype}, the result {dtype}; a and b must be float32, the "
            f"others float32 or bfloat16"
        )
    return same_device("low_rank", w, a, b).merge(w, a, b, nearest(scale), dtype)  # type: ignore[no-any-return]


def nearest(scale: float) -> float:
    """Returns the float32 nearest to `scale`, which every device multiplies with."""
    return float(np.float32(scale))


def with_low_rank_gradient(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    sections: Sequence[int],
    leaves: int,
    groups: torch.Tensor,
) -> torch.Tensor:
    """Returns y = x w'^T as it is, and gives a and b their gradients through w' = w + scale b a. The gradient of w' itself,
    dy^T x, is never made: with u = scale x a^T [T, r] and v = scale dy b [T, r],

        da = scale b^T (dy^T x) = v^T x;  db = scale (dy^T x) a^T = dy^T u

    y [T, N], x [T, K] float32 or bfloat16. `sections`: rows of w' that have an a of their own, each; a [sections r, K] holds
    these one below the other, b [N, r]. u and v are matmuls on the tree of `leaves` leaves (over K, and over a section's rows),
    times `scale` in float32, rounded to the dtype of x; da and db, float32 or what the tensors ask for, sum over tokens, one
    leaf for each group of sequences (`groups`: int64 token offsets [G + 1]). So they are invariant to all that the gradient of
    a whole weight is: the cut of the batch into micro-batches and ranks above all.

    The backward pass raises UnsupportedError where shapes do not fit, TreeError where `leaves` divides not K or not a section.
    """
    return _LowRank.apply(y, x, a, b, scale, tuple(sections), leaves, groups)  # type: ignore[no-any-return]


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, scale, sections, leaves, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, a, b, groups)
        ctx.how, ctx.dtypes = (scale, sections, leaves), (gradient_dtype(a), gradient_dtype(b))
        ctx.mark_dirty(y)  # it is y itself, not a view of it, that has another gradient function now
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        *given, groups = ctx.saved_tensors
        da, db = low_rank_gradients(dy, *given, *ctx.how, groups)
        return dy, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None, None, None, None


def low_rank_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    sections: Sequence[int],
    leaves: int,
    groups: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (da, db), float32, as `with_low_rank_gradient` says."""
    rank = b.shape[1]
    if dy.shape[1] != b.shape[0] or sum(sections) != b.shape[0] or a.shape != (len(sections) * rank, x.shape[1]):
        raise UnsupportedError(
            f"low_rank: dy {tuple(dy.shape)}, x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)} and sections "
            f"{tuple(sections)} do not fit"
        )
    dy, a, b, scale = dy.to(x.dtype), a.to(x.dtype), b.to(x.dtype), nearest(scale)
    u = _scaled(x, a, leaves, scale)
    parts = list(zip(dy.split(sections, 1), b.split(sections), u.split(rank, 1), strict=True))
    v = torch.cat([_scaled(part, of_b.T, leaves, scale) for part, of_b, _ in parts], 1)
    db = torch.cat([weight_gradient(part, of_u, groups) for part, _, of_u in parts])
    return weight_gradient(v, x, groups), db


def low_rank_gradients_by_leaf(
    dy: Sequence[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    groups: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the (da, db) of `low_rank_gradients` of one section from a dy that comes leaf by leaf, [T, N / leaves] each: the
    same bits."""
    a, b, scale, leaves = a.to(x.dtype), b.to(x.dtype), nearest(scale), len(dy)
    u = _scaled(x, a, leaves, scale)
    contract = same_device("matmul", x, b).contract
    roots = [
        contract(part, of_b.T, [0, part.shape[1]], torch.float32)
        for part, of_b in zip(dy, b.chunk(leaves), strict=True)
    ]
    v = (fold(roots, torch.add) * scale).to(x.dtype)
    return weight_gradient(v, x, groups), torch.cat([weight_gradient(part, u, groups) for part in dy])


def _scaled(x: torch.Tensor, w: torch.Tensor, leaves: int, scale: float) -> torch.Tensor:
    """scale x w^T: the unrounded root, times the scale in float32, rounded to the dtype of x."""
    bounds = leaf_bounds(x.shape[1], leaves, "contraction length")
    root = same_device("matmul", x, w).contract(x, w, bounds, torch.float32)
    return (root * scale).to(x.dtype)  # type: ignore[no-any-return]
