"""Adds what a token's experts say, weighted, on the tree of experts; and the residual add and norm that follow."""

from typing import NamedTuple

import torch

from kernels.device import UnsupportedError, same_device
from kernels.ops.dispatch import Slots


class Mixture(NamedTuple):
    """Holds what `combine` adds, in its dtype, until somebody needs the sum."""

    y: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    slots: Slots
    leaves: int


def combine(
    y: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: Slots,
    leaves: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes out[t] = the tree over `leaves` equal parts of this rank's experts; a leaf is one fused multiply-add chain
    weights[t, i] y[row of choice i] over the choices that fall into it, in ascending expert, from zero. +0 where none does.

    y [capacity, n] float32 or bfloat16, weights float32 [T, k] and ids int32 [T, k] from `route` -> [T, n] in `out_dtype`
    (default: that of y), rounded once at the root. A rank with a part of the experts passes its share of the leaves and
    out_dtype=float32, and `collectives` adds the roots.

    Gradients: dy = weights * d_out, rounded once; d_weights[t, i] = y . d_out over n, in the order of a row (`ops/rms_norm`).
    Invariant to T, to the position of a row, to shards of the experts along leaves.
    Raises UnsupportedError where `leaves` does not divide the experts.
    """
    _check(Mixture(y, weights, ids, slots, leaves))
    return _Combine.apply(y, weights, ids, slots, leaves, out_dtype or y.dtype)


def combine_add_norm(
    x: torch.Tensor, mixture: Mixture, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does add_rms_norm(x, combine(*mixture), weight, eps) in one call, to the same bits, where no gradient is asked for.

    x [T, n] of the dtype of the mixture, weight [n] -> (norm, sum), each [T, n]."""
    _check(mixture)
    y, weights, ids, slots, leaves = mixture
    if x.shape != (len(weights), y.shape[1]) or x.dtype != y.dtype or weight.shape != x.shape[1:]:
        raise UnsupportedError(
            f"combine_add_norm: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} for a mixture of "
            f"{len(weights)} rows of {y.shape[1]} {y.dtype}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, weights, weight)):
        raise UnsupportedError("combine_add_norm has no gradient: call combine and add_rms_norm")
    op, local = same_device("combine", x, y, weights, weight), (ids, slots.first, slots.experts // leaves)
    return op.add_norm(y.contiguous(), weights, slots.of, *local, leaves, x, weight.to(x.dtype), eps)


def _check(mixture: Mixture) -> None:
    y, weights, ids, slots, leaves = mixture
    if slots.experts % leaves or leaves & (leaves - 1):
        raise UnsupportedError(f"combine: {leaves} leaves, a power of two, must divide {slots.experts} experts")
    if y.shape[0] != slots.capacity or weights.shape != slots.of.shape or ids.shape != slots.of.shape:
        raise UnsupportedError(
            f"combine: y {tuple(y.shape)}, weights {tuple(weights.shape)}, ids {tuple(ids.shape)} for {slots.capacity} slots "
            f"of choices {tuple(slots.of.shape)}"
        )


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, ids, slots, leaves, out_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, weights)
        ctx.slots = slots
        local = (ids, slots.first, slots.experts // leaves)
        return same_device("combine", y, weights).forward(y.contiguous(), weights, slots.of, *local, leaves, out_dtype)

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        y, weights = ctx.saved_tensors
        implementation = same_device("combine", y, d_out)
        dy, d_weights = implementation.backward(d_out.to(y.dtype).contiguous(), y, weights, ctx.slots.of)
        return dy, d_weights, None, None, None, None
