"""Adds what a token's experts say, weighted, on the tree of experts."""

import torch

from kernels.device import UnsupportedError, same_device
from kernels.ops.dispatch import Slots


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
    if slots.experts % leaves or leaves & (leaves - 1):
        raise UnsupportedError(f"combine: {leaves} leaves, a power of two, must divide {slots.experts} experts")
    if y.shape[0] != slots.capacity or weights.shape != slots.of.shape or ids.shape != slots.of.shape:
        raise UnsupportedError(
            f"combine: y {tuple(y.shape)}, weights {tuple(weights.shape)}, ids {tuple(ids.shape)} for {slots.capacity} slots "
            f"of choices {tuple(slots.of.shape)}"
        )
    return _Combine.apply(y, weights, ids, slots, leaves, out_dtype or y.dtype)


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
