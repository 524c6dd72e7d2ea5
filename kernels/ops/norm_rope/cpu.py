"""CPU norm_rope: the two ops one after the other."""

import torch

from kernels.ops.rms_norm import cpu as rms_norm
from kernels.ops.rope import cpu as rope


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [x[:, : x.shape[1] - kv_heads], x[:, x.shape[1] - kv_heads :]]
    if weights is not None:
        parts = [rms_norm.forward(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]
    q, k = (rope.rotate(part, *table, positions, 1.0) for part in parts)
    return q, k


def backward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """(dx in the dtype of x; each head's contribution to the gradients of the weights, float32 [T, heads, head_dim] and
    [T, kv_heads, head_dim])."""
    turned = [rope.rotate(dy, *table, positions, -1.0) for dy in (dq, dk)]
    if weights is None:
        return torch.cat(turned, 1), None
    parts = x.split((dq.shape[1], dk.shape[1]), 1)
    (dx_q, q_rows), (dx_k, k_rows) = (
        rms_norm.backward(part, weight, dy, eps) for part, weight, dy in zip(parts, weights, turned, strict=True)
    )
    return torch.cat([dx_q, dx_k], 1), (q_rows, k_rows)
