"""What heads of queries and keys pass before attention: a norm (in families that have one), then rope, in one pass."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.reduce import sum_rows

Table = tuple[torch.Tensor, torch.Tensor]


def norm_rope(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: Table,
    positions: torch.Tensor,
    kv_heads: int,
    *,
    groups: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) = rope(rms_norm(heads of x)), rounded after the norm and after rope, as by the two ops one after the other: the
    outputs and the gradients have their bits.

    x [T, heads + kv_heads, head_dim], the query heads first (a slice of the fused projection; the last dimension contiguous);
    weights: of the query norm and the key norm, each [head_dim], or None for no norm; the rest as in rms_norm and rope ->
    [T, heads, head_dim], [T, kv_heads, head_dim].

    Invariant to batch, position in it, and shard of the heads.
    """
    if x.dim() != 3 or x.shape[2] != 2 * table[0].shape[1] or not 0 < kv_heads < x.shape[1]:
        raise UnsupportedError(
            f"norm_rope: x {tuple(x.shape)} with {kv_heads} key heads against a table for head_dim {2 * table[0].shape[1]}"
        )
    trained = weights is not None and any(w.requires_grad for w in weights)
    if groups is None and trained and torch.is_grad_enabled():
        raise UnsupportedError("norm_rope: the weights need gradients, so `groups` must say where each group ends")
    return _NormRope.apply(x, *(weights or (None, None)), eps, *table, positions, kv_heads, groups)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q_weight, k_weight, eps, cosine, sine, positions, kv_heads, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, q_weight, k_weight, cosine, sine, positions, groups)
        ctx.eps, ctx.kv_heads = eps, kv_heads
        ctx.weight_dtype = None if q_weight is None else gradient_dtype(q_weight)
        rounded = None if q_weight is None else (q_weight.to(x.dtype), k_weight.to(x.dtype))
        op = same_device("norm_rope", x, cosine, positions)
        return op.forward(x, rounded, eps, (cosine, sine), positions, kv_heads)

    @staticmethod
    def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
        x, q_weight, k_weight, cosine, sine, positions, groups = ctx.saved_tensors
        rounded = None if q_weight is None else (q_weight.to(x.dtype), k_weight.to(x.dtype))
        op = same_device("norm_rope", x, dq, dk)
        dx, d_rows = op.backward(x, rounded, ctx.eps, (cosine, sine), positions, dq, dk)
        if d_rows is None or groups is None:
            return dx, *(None,) * 8
        d_weights = (sum_rows(d.flatten(0, 1), groups * d.shape[1]).to(ctx.weight_dtype) for d in d_rows)
        return dx, *d_weights, *(None,) * 6
